"""Write head statistics: one number a layer for the loggers, everything as a table."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from attn_callbacks.functional import STATISTICS
from attn_callbacks.metrics import HeadStatisticsResult

__all__ = ["append_importance", "append_table", "importance_scalars", "layer_scalars", "statistic_means"]

Array = np.ndarray[Any, Any]

_COLUMNS = ("epoch", "step", "layer", "head", "statistic", "value", "standard_error")


def statistic_means(values: Tensor) -> dict[str, float]:
    """Means over ``(heads, statistics)`` of the statistics that some head has."""
    means = values.nanmean(dim=0).tolist()
    return {name: mean for name, mean in zip(STATISTICS, means, strict=True) if mean == mean}  # NaN is not itself


def layer_scalars(result: HeadStatisticsResult, labels: Sequence[str], per_head: bool) -> Iterator[tuple[str, float]]:
    """Tag and value of each layer's mean and, on request, of each head."""
    for layer, label in enumerate(labels):
        for name, value in statistic_means(result.mean[layer]).items():
            yield f"heads/{name}/{label}", value
        if per_head:
            for head, index, value in _cells(result.mean[layer].tolist()):
                yield f"heads/{STATISTICS[index]}/{label}/head_{head}", value


def importance_scalars(mean: Tensor, labels: Sequence[str], per_head: bool) -> Iterator[tuple[str, float]]:
    """Tag and value of each layer's mean importance and, on request, of each head's, from ``(layers, heads)``."""
    for label, row, average in zip(labels, mean.tolist(), mean.nanmean(dim=-1).tolist(), strict=True):
        if average == average:  # NaN is not itself
            yield f"heads/importance/{label}", average
        for head, value in enumerate(row if per_head else ()):
            if value == value:
                yield f"heads/importance/{label}/head_{head}", value


def append_table(path: Path, epoch: int, step: int, fields: Sequence[Array], labels: Sequence[str]) -> None:
    """Append a row a layer, head and statistic to a CSV file; medians are statistics ``<name>_median``.

    Args:
        path: The file.
        epoch: Epoch of training.
        step: Optimiser steps taken.
        fields: Mean, standard error and median, each ``(layers, heads, statistics)``.
        labels: Names of the layers.
    """
    rows = ((label, *row) for n, label in enumerate(labels) for row in _rows(*(field[n] for field in fields)))
    _append(path, epoch, step, rows)


def append_importance(path: Path, epoch: int, step: int, fields: Sequence[Array], labels: Sequence[str]) -> None:
    """Append a row ``importance`` a layer and head; ``fields`` are mean and standard error, ``(layers, heads)``."""
    rows = (
        (label, head, "importance", value, error if error == error else "")
        for label, *cells in zip(labels, *(field.tolist() for field in fields), strict=True)
        for head, (value, error) in enumerate(zip(*cells, strict=True))
        if value == value
    )
    _append(path, epoch, step, rows)


def _append(path: Path, epoch: int, step: int, rows: Iterable[tuple[str, int, str, float, float | str]]) -> None:
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(_COLUMNS)
        writer.writerows((epoch, step, *row) for row in rows)


def _rows(mean: Array, error: Array, median: Array) -> Iterator[tuple[int, str, float, float | str]]:
    errors = error.tolist()
    for head, index, value in _cells(mean.tolist()):
        own = errors[head][index]
        yield head, STATISTICS[index], value, own if own == own else ""
    for head, index, value in _cells(median.tolist()):
        yield head, f"{STATISTICS[index]}_median", value, ""


def _cells(values: list[list[float]]) -> Iterator[tuple[int, int, float]]:
    """Head, number of the statistic, and value of everything that is defined in ``(heads, statistics)``."""
    for head, row in enumerate(values):
        for index, value in enumerate(row):
            if value == value:
                yield head, index, value
