"""Smaller attention maps that are still attention: rows sum to what they summed to."""

from __future__ import annotations

from math import ceil

import numpy as np
from numpy.typing import NDArray

from attn_callbacks._checks import at_least

__all__ = ["pool"]

Floats = NDArray[np.floating]


def pool(maps: Floats, max_queries: int, max_keys: int) -> Floats:
    """Shrink attention maps to at most ``max_queries`` rows and ``max_keys`` columns.

    Neighbouring queries are averaged, the weights of neighbouring keys are added up, so a pooled row is the mean
    attention of its queries to spans of keys and still sums to one. Spans have equal lengths, but for the last one.

    Args:
        maps: Attention weights.
        max_queries: Largest number of rows.
        max_keys: Largest number of columns.

    Shape:
        - maps: ``(..., queries, keys)``
        - output: ``(..., rows, columns)``

    Raises:
        ValueError: If a limit is below one.

    Example:
        >>> pool(np.array([[0.5, 0.5, 0.0], [0.25, 0.25, 0.5]]), 1, 2).tolist()
        [[0.75, 0.25]]
    """
    queries, keys = maps.shape[-2:]
    rows = span(queries, at_least("max_queries", max_queries, 1))
    columns = span(keys, at_least("max_keys", max_keys, 1))
    if rows > 1:
        starts = np.arange(0, queries, rows)
        counts = np.diff(np.append(starts, queries)).astype(maps.dtype)
        maps = np.add.reduceat(maps, starts, axis=-2) / counts[:, None]
    return np.add.reduceat(maps, np.arange(0, keys, columns), axis=-1) if columns > 1 else maps


def span(length: int, limit: int) -> int:
    """Return how many neighbours one span must hold for at most ``limit`` spans."""
    return max(1, ceil(length / limit))
