"""Compare methods against bias: ``python -m benchmarks.debias --work decoy-digits --methods erm,ours --out DIR``.

Methods take turns, seed by seed; every row is written at once, and rows that are there already are not run again.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.debias.method import Method
from benchmarks.debias.methods import CONTROL, METHODS, find_method
from benchmarks.debias.summary import table
from benchmarks.debias.trial import train
from benchmarks.debias.work import WORKS, Work, find_work

__all__ = ["main"]

FILE, QUICK_STEPS = "debias.json", 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the trials that are wanted and print the table."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    methods = [find_method(name) for name in options.methods.split(",")]
    works = [work for name in options.work.split(",") if (work := _present(name)) is not None]
    path = options.out / FILE
    rows = json.loads(path.read_text()) if path.exists() else []
    seeds = 1 if options.quick else options.seeds
    for work, method, seed in _trials(works, methods, seeds, rows):
        row = train(work, method, seed, QUICK_STEPS if options.quick else None)
        rows.append(row)
        _write(path, rows)
        print(
            f"{work.name}, {method.name}, seed {seed}: accuracy {row['accuracy']:.3f}, worst {row['worst']:.3f}, "
            f"{row['seconds']:.0f} s",
            flush=True,
        )
    print(f"\n{table(rows, CONTROL)}" if rows else "Nothing was run.")
    return 0


def _trials(
    works: Sequence[Work], methods: Sequence[Method], seeds: int, rows: Sequence[dict[str, Any]]
) -> Iterator[tuple[Work, Method, int]]:
    """Yield what is still to be run; say once what does not apply."""
    done = {(row["work"], row["method"], row["seed"]) for row in rows}
    fitting = {}
    for work in works:
        train_samples = work.build(0).train
        for method in methods:
            reason = method.unfit(work, train_samples)
            fitting[work.name, method.name] = not reason
            if reason:
                print(reason, flush=True)
    for seed in range(seeds):
        for work in works:
            for method in methods:
                if fitting[work.name, method.name] and (work.name, method.name, seed) not in done:
                    yield work, method, seed


def _present(name: str) -> Work | None:
    work = find_work(name)
    if missing := work.missing():
        print(missing, flush=True)
        return None
    return work


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Replace the file at once, so that an interrupted run leaves a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(rows, indent=1))
    os.replace(draft, path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("benchmarks.debias", description="Methods against bias, on the same budget.")
    parser.add_argument("--work", default=",".join(WORKS), help="works, separated by commas")
    parser.add_argument("--methods", default=",".join(METHODS), help="methods, separated by commas")
    parser.add_argument("--seeds", type=int, default=5, help="seeds, from 0 up")
    parser.add_argument("--out", type=Path, default=Path("runs/debias"), help="folder of debias.json")
    parser.add_argument("--quick", action="store_true", help="one seed and a few steps")
    return parser


if __name__ == "__main__":
    sys.exit(main())
