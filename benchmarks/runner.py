"""Run tables by name, say how far it is, and keep what came: one JSON file a table and one with everything."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import facts
from benchmarks.show import show_block, show_goals
from benchmarks.table import Setting, Table

__all__ = ["NAMES", "ON_DEMAND", "load", "main"]

NAMES = (
    "attention_call",
    "memory",
    "capture",
    "training",
    "pictures",
    "log_points",
    "importance",
    "heads",
    "recompiles",
)
"""The tables with goals, in the order in which they are run; each is a module of this package."""

ON_DEMAND = ("losses", "observers")
"""Tables that are run only by name."""


def load(name: str) -> Table:
    """Return a table by name."""
    table: Table = importlib.import_module(f"benchmarks.{name}").TABLE
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; return 0, 1 if a table failed, or 2 if nothing could be run."""
    chosen = _parser().parse_args(arguments)
    problem = _problem(chosen)
    if problem is not None:
        print(problem, file=sys.stderr)
        return 2
    torch.set_num_threads(chosen.threads)
    warnings.filterwarnings("ignore")
    setting = Setting(chosen.device, chosen.quick, chosen.long)
    machine = {**facts(chosen.device), "quick": chosen.quick, "long": chosen.long}
    print("   ".join(f"{name}: {value}" for name, value in machine.items()), flush=True)
    names, started, results = sorted(chosen.names or NAMES, key=ON_DEMAND.__contains__), time.monotonic(), []
    for position, name in enumerate(names, 1):
        elapsed = time.monotonic() - started
        print(f"\n[{position}/{len(names)}] {name}   ({elapsed / 60:.1f} minutes so far)", flush=True)
        results.append(_run(name, setting))
        _write(chosen.out / f"{name}.json", {**results[-1], "machine": machine})
        _summarise(chosen.out)
    failed = [result["table"] for result in results if result["error"]]
    print(f"\nDone in {(time.monotonic() - started) / 60:.1f} minutes. Results: {chosen.out}/")
    if failed:
        print(f"Failed: {', '.join(failed)}.", file=sys.stderr)
    return int(bool(failed))


def _problem(chosen: argparse.Namespace) -> str | None:
    """Say in one sentence what would stop a run, before anything is measured."""
    unknown = [name for name in chosen.names if name not in (*NAMES, *ON_DEMAND)]
    if unknown:
        return f"No table is named {', '.join(map(repr, unknown))}. Known: {', '.join((*NAMES, *ON_DEMAND))}."
    if chosen.threads < 1:
        return f"`--threads` must be at least 1, got {chosen.threads}."
    return _device_problem(chosen.device) or _folder_problem(chosen.out)


def _device_problem(name: str) -> str | None:
    try:
        device = torch.device(name)
    except RuntimeError:
        return f"`--device` must be cpu or cuda, got {name!r}."
    if device.type not in ("cpu", "cuda"):
        return f"`--device` must be cpu or cuda, got {name!r}."
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        return f"`--device {name}` needs a GPU that torch can use, and it finds {torch.cuda.device_count()}."
    return None


def _folder_problem(folder: Path) -> str | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"`--out {folder}` cannot be a folder: {error.strerror}."
    return None if os.access(folder, os.W_OK) else f"`--out {folder}` cannot be written to."


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks", description="Measure what everything costs.")
    parser.add_argument("names", nargs="*", help=f"tables: {', '.join(NAMES)} (all by default), {', '.join(ON_DEMAND)}")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder for the JSON files")
    parser.add_argument("--quick", action="store_true", help="only see whether it runs: two pairs of tiny problems")
    parser.add_argument("--long", action="store_true", help="also single calls at 16,384 and 65,536 tokens")
    parser.add_argument("--device", default="cpu", help="where the tensors live: cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    return parser


def _run(name: str, setting: Setting) -> dict[str, Any]:
    """Run one table; whatever goes wrong in it must not lose the others."""
    torch.manual_seed(0)
    started, blocks, error = time.monotonic(), {}, None
    table: Table | None = None
    try:
        table = load(name)
        print(table.title, flush=True)
        for block in table.run(setting):
            blocks[block.key] = block
            show_block(block)
            sys.stdout.flush()
    except Exception as failure:  # noqa: BLE001
        traceback.print_exc()
        error = f"{type(failure).__name__}: {failure}"
    goals = [goal.judged(blocks, setting.device) for goal in table.goals] if table else []
    print()
    show_goals(goals)
    return {
        "table": name,
        "title": table.title if table else name,
        "seconds": time.monotonic() - started,
        "error": error,
        "blocks": [block.plain() for block in blocks.values()],
        "goals": goals,
    }


def _summarise(folder: Path) -> None:
    """Gather all tables that the folder holds, those of earlier runs included."""
    paths = [folder / f"{name}.json" for name in (*NAMES, *ON_DEMAND)]
    results = [json.loads(path.read_text("utf-8")) for path in paths if path.exists()]
    tables = {result["table"]: {key: result[key] for key in ("seconds", "error", "machine")} for result in results}
    _write(
        folder / "summary.json", {"tables": tables, "goals": [goal for result in results for goal in result["goals"]]}
    )


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
