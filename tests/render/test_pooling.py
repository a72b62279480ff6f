"""Pooling against loops over every bucket."""

from __future__ import annotations

import numpy as np
import pytest

from attn_callbacks.render import pool
from tests.render.decoding import attention


def reference(maps, rows, columns):
    """Mean over spans of queries, sum over spans of keys, one bucket at a time."""
    heads, queries, keys = maps.shape
    starts = range(0, queries, rows), range(0, keys, columns)
    pooled = np.zeros((heads, len(starts[0]), len(starts[1])))
    for head in range(heads):
        for i, row in enumerate(starts[0]):
            for j, column in enumerate(starts[1]):
                bucket = maps[head, row : row + rows, column : column + columns]
                pooled[head, i, j] = bucket.sum(axis=1).mean()
    return pooled


@pytest.mark.parametrize(
    ("queries", "keys", "limits", "spans"),
    [
        (8, 8, (4, 4), (2, 2)),
        (7, 11, (3, 4), (3, 3)),
        (5, 9, (5, 2), (1, 5)),
        (9, 4, (1, 1), (9, 4)),
        (1, 1, (3, 3), (1, 1)),
    ],
)
def test_against_loops(queries, keys, limits, spans):
    maps = attention(2, queries, keys)
    pooled = pool(maps, *limits)
    np.testing.assert_allclose(pooled, reference(maps, *spans))
    np.testing.assert_allclose(pooled.sum(axis=-1), 1.0)
    assert pooled.shape[1] <= limits[0]
    assert pooled.shape[2] <= limits[1]


def test_leading_axes_and_dtype_stay():
    maps = attention(6, 10, 10).astype(np.float32).reshape(2, 3, 10, 10)
    assert pool(maps, 5, 3).shape == (2, 3, 5, 3)
    assert pool(maps, 5, 3).dtype == np.float32
    np.testing.assert_array_equal(pool(maps, 10, 10), maps)


def test_checks():
    with pytest.raises(ValueError, match="`max_queries` must be at least 1, got 0"):
        pool(np.ones((1, 2, 2)), 0, 1)
    with pytest.raises(ValueError, match="`max_keys` must be at least 1, got 0"):
        pool(np.ones((1, 2, 2)), 1, 0)
