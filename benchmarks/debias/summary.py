"""Rows of trials as a table: mean and standard error, cost against plain training, effect against the control."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["effect", "mean_and_error", "table"]

Row = Mapping[str, Any]
Figure = tuple[float, float]

PLAIN, FIGURES = "erm", ("accuracy", "worst", "macro_f1", "reliance", "attention_mass")


def table(rows: Sequence[Row], control: str) -> str:
    """Return a Markdown table for each work.

    Args:
        rows: Rows of trials.
        control: Method that the others are compared with on the same seeds.
    """
    works = dict.fromkeys(row["work"] for row in rows)
    return "\n\n".join(_table(work, [row for row in rows if row["work"] == work], control) for work in works)


def mean_and_error(values: Sequence[float]) -> Figure:
    """Return the mean and its standard error, which one value does not have."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def effect(rows: Sequence[Row], method: str, control: str, figure: str) -> Figure | None:
    """Return by how much a method exceeds the control, paired by seed; ``None`` without a common seed."""
    ours, theirs = ({row["seed"]: row[figure] for row in rows if row["method"] == each} for each in (method, control))
    common = [seed for seed in ours if seed in theirs]
    return mean_and_error([ours[seed] - theirs[seed] for seed in common]) if common else None


def _table(work: str, rows: Sequence[Row], control: str) -> str:
    lines = [
        f"### {work}\n",
        f"| method | seeds | accuracy | worst | macro-F1 | reliance | attention mass | cost | worst, less {control} |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        figures = [_shown(_figure(own, name)) for name in FIGURES]
        against = None if method == control else effect(rows, method, control, "worst")
        lines.append(f"| {' | '.join([method, str(len(own)), *figures, _cost(rows, method), _shown(against)])} |")
    return "\n".join(lines)


def _figure(rows: Sequence[Row], name: str) -> Figure | None:
    values = [row[name] for row in rows if row.get(name) is not None]
    return mean_and_error(values) if values else None


def _cost(rows: Sequence[Row], method: str) -> str:
    """Return the mean ratio of seconds to those of plain training with the same seed."""
    seconds, plain = (
        {row["seed"]: row["seconds"] for row in rows if row["method"] == each} for each in (method, PLAIN)
    )
    ratios = [seconds[seed] / plain[seed] for seed in seconds if plain.get(seed)]
    return f"{sum(ratios) / len(ratios):.1f}" if ratios else "-"


def _shown(figure: Figure | None) -> str:
    if figure is None:
        return "-"
    mean, error = figure
    return f"{mean:.3f}" if math.isnan(error) else f"{mean:.3f} ± {error:.3f}"
