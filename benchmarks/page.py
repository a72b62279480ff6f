"""Write the measured table of ``docs/performance.md`` from the JSON files of a run: no number there is typed.

Run: ``python -m benchmarks.page FOLDER [PAGE]``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.runner import NAMES, load
from benchmarks.show import readable

__all__ = ["fill", "main", "table"]

PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- measured: python -m benchmarks.page -->", "<!-- /measured -->"
HEADER = "| | Quantity | Goal | Limit | Predicted | Measured [95 %] | | What stands between |"
RULE = "|---|---|---|---|---|---|---|---|"
LATER = (("G5", "all maps of 12 layers, 1024 tokens, against tools that probe with values", "≥ 50", "about 130"),)
COVERAGE = (
    "| G18 | share of heads whose 95 % interval from sampled rows covers the exact value | 90 to 98 % | 95 % | 95 % "
    "| held by `tests/metrics/test_coverage.py` | | |"
)


def table(folder: Path) -> str:
    """Return the table of all goals, and a line on the machine of each table that was run."""
    paths = {name: folder / f"{name}.json" for name in NAMES}
    results = {name: json.loads(path.read_text("utf-8")) for name, path in paths.items() if path.exists()}
    quick = [name for name, result in results.items() if result["machine"]["quick"]]
    if not results:
        raise ValueError(
            f"`{folder}` holds no results. Give the folder that `python -m benchmarks --out FOLDER` wrote."
        )
    if quick:
        raise ValueError(f"Measured with --quick, which measures nothing: {', '.join(quick)}. Run them without it.")
    rows = [(goal["number"], _row(goal)) for goal in _goals(results)]
    rows += [(later[0], f"| {' | '.join(later)} | | not measured yet | | |") for later in LATER]
    rows.append(("G18", COVERAGE))
    rows.sort(key=lambda row: int(row[0][1:]))
    return "\n".join([*_machines(results), "", HEADER, RULE, *(row for _, row in rows)])


def fill(page: str, table: str) -> str:
    """Put a table between the two markers of a page."""
    before, found, rest = page.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (found and ended):
        raise ValueError(f"The page needs the lines {BEGIN!r} and {END!r}; the table goes between them.")
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def main(arguments: list[str]) -> int:
    """Rewrite a page."""
    if not 1 <= len(arguments) <= 2 or not Path(arguments[0]).is_dir():
        print("Give the folder that `python -m benchmarks --out FOLDER` wrote.", file=sys.stderr)
        return 2
    page = Path(arguments[1]) if len(arguments) == 2 else PAGE
    if not page.is_file():
        print(f"There is no page `{page}` to write the table into.", file=sys.stderr)
        return 2
    try:
        page.write_text(fill(page.read_text("utf-8"), table(Path(arguments[0]))), "utf-8")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"Wrote the table of {page.name}.")
    return 0


def _goals(results: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield goals as they were measured, or as they are written down where nobody measured them."""
    for name in NAMES:
        if name in results:
            yield from results[name]["goals"]
        else:
            yield from (goal.judged({}, "cpu") for goal in load(name).goals)


def _row(goal: dict[str, Any]) -> str:
    unit = goal["unit"] and f" {goal['unit']}"
    sign = "≥ " if goal["at_least"] else "≤ " if goal["bound"] else ""
    cells = (
        goal["number"],
        goal["quantity"],
        f"{sign}{goal['bound']:.4g}{unit}",
        goal["limit"],
        "" if goal["predicted"] is None else f"{goal['predicted']:.4g}{unit}",
        _measured(goal["measured"], unit),
        _verdict(goal),
        goal["between"],
    )
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _measured(measured: dict[str, float] | None, unit: str) -> str:
    if measured is None:
        return "not measured yet"
    value, low, high = (readable(measured[end]) for end in ("value", "low", "high"))
    return f"{value}{unit}" if measured["low"] == measured["high"] else f"{value} [{low}, {high}]{unit}"


def _verdict(goal: dict[str, Any]) -> str:
    if goal["verdict"] != "missed":
        return {"met": "met", "undecided": "within the noise", None: ""}[goal["verdict"]]
    value, bound = goal["measured"]["value"], goal["bound"]
    if not bound or not value:
        return "**missed**"
    return f"**missed**, by a factor of {readable(bound / value if goal['at_least'] else value / bound)}"


def _machines(results: dict[str, Any]) -> Iterator[str]:
    """Say what was run where, once for each machine."""
    tables: dict[str, list[str]] = {}
    for name, result in results.items():
        facts = result["machine"]
        threads = f"{facts['threads']} thread{'s' * (facts['threads'] > 1)} of {facts['cores']} cores"
        where = facts["processor"] if facts["device"] == "cpu" else f"{facts['device']}, {facts['processor']}"
        line = f"{where}, {threads}, torch {facts['torch']}, Python {facts['python']}, {facts['date']}"
        tables.setdefault(line, []).append(name)
    for line, names in tables.items():
        yield f"Measured on: {line}" + (f" ({', '.join(names)})" if len(tables) > 1 else "") + "."
    for name, result in results.items():
        if result["error"]:
            yield f"`{name}` failed: {result['error']}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
