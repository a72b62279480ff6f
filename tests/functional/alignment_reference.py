"""Alignment by loops over samples, heads and tokens, from the definitions."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def links(weights: Array, rows: Array, columns: Array, mutual: bool = False) -> set[tuple[int, int]]:
    """Links of one head on one sample, as (target, source)."""
    real_rows, real_columns = np.flatnonzero(rows), np.flatnonzero(columns)
    found = set()
    for t in real_rows:
        best = max(real_columns, key=lambda s: (weights[t, s], -s), default=None)
        if best is None or not weights[t, best] > 0:
            continue
        back = max(real_rows, key=lambda other: (weights[other, best], -other))
        if not mutual or back == t:
            found.add((int(t), int(best)))
    return found


def pairs(gold: Array, rows: Array, columns: Array) -> set[tuple[int, int]]:
    return {(int(t), int(s)) for t, s in np.argwhere(gold) if rows[t] and columns[s]}


def ratios(
    weights: Array, sure: Array, possible: Array, rows: Array, columns: Array, mutual: bool = False
) -> dict[str, tuple[float, float]]:
    """Numerator and denominator of every quantity, of one head on one sample."""
    a, s = links(weights, rows, columns, mutual), pairs(sure, rows, columns)
    p = s | pairs(possible, rows, columns)
    places = [next(source for target, source in sorted(a) if target == t) for t in sorted({t for t, _ in a})]
    steps = list(pairwise(places))
    sources = np.flatnonzero(columns) if rows.any() else []
    received = [sum(weights[t, j] for t in np.flatnonzero(rows)) for j in sources]
    tops = [top for t in np.flatnonzero(rows) if columns.any() and (top := weights[t][columns].max()) > 0]
    known = len(a) if p else 0
    return {
        "error_rate": (known + len(s) - len(a & s) - len(a & p), known + len(s)),
        "precision": (len(a & p), known),
        "recall": (len(a & s), len(s)),
        "monotonicity": (sum(after >= before for before, after in steps), len(steps)),
        "coverage": (len({source for _, source in a}), len(sources)),
        "coverage_deviation": (sum(math.log1p((1 - mass) ** 2) for mass in received), len(sources)),
        "confidence": (sum(tops), len(tops)),
    }
