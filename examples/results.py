"""Results of several training runs over seeds: a table to read and a JSON file to keep."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

__all__ = ["Result", "save", "story", "table"]


class Result(NamedTuple):
    """Test result of one run.

    Args:
        accuracy: Share of all test samples that are right.
        groups: The same for each group, by name.
    """

    accuracy: float
    groups: dict[str, float]

    @property
    def worst_group(self) -> float:
        """Accuracy of the worst group."""
        return min(self.groups.values())


def table(arms: dict[str, list[Result]]) -> str:
    """Lay out the arms' means (and, from two seeds on, standard errors) as text."""
    names = list(next(iter(arms.values()))[0].groups)
    rows = [["", "accuracy", "worst group", *names]]
    for arm, runs in arms.items():
        columns = [[run.accuracy for run in runs], [run.worst_group for run in runs]]
        columns += [[run.groups[name] for run in runs] for name in names]
        rows.append([arm, *(_with_error(column) for column in columns)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def story(ledger: Sequence[Mapping[str, Any]]) -> str:
    """What a bias monitor saw at each validation, and what it did about it."""
    lines = []
    for entry in ledger:
        worst = next(name for name in ("worst_group_accuracy", "worst_class_recall") if name in entry)
        seen = ", ".join(f"{name.replace('_', ' ')} {entry[name]:.2f}" for name in ("accuracy", worst, "gap"))
        lines += [f"  epoch {entry['epoch']}, step {entry['step']:3d}: {seen}"]
        lines += [f"      {each['feedback']}: {each['action']}" for each in entry["decisions"]]
    return "\n".join(lines)


def save(path: Path, arms: dict[str, list[Result]], seeds: Sequence[int]) -> None:
    """Write means and standard errors of every arm, and the single runs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**{arm: _summary(runs) for arm, runs in arms.items()}, "seeds": list(seeds)}, indent=2))


def _summary(runs: list[Result]) -> dict[str, object]:
    accuracy, worst = [run.accuracy for run in runs], [run.worst_group for run in runs]
    return {
        "accuracy": mean(accuracy),
        "accuracy_standard_error": _error(accuracy),
        "worst_group": mean(worst),
        "worst_group_standard_error": _error(worst),
        "groups": {name: mean(run.groups[name] for run in runs) for name in runs[0].groups},
        "runs": [{"accuracy": run.accuracy, "worst_group": run.worst_group, "groups": run.groups} for run in runs],
    }


def _error(values: Sequence[float]) -> float | None:
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def _with_error(values: Sequence[float]) -> str:
    error = _error(values)
    return f"{mean(values):.3f}" if error is None else f"{mean(values):.3f} ± {error:.3f}"
