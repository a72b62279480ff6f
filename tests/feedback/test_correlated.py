"""Cramér's V against the formula in numpy, and against chance."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attn_callbacks.feedback._correlated import cramers_v


def bergsma(table):
    table = np.asarray(table, dtype=float)
    total = table.sum()
    expected = np.outer(table.sum(axis=1), table.sum(axis=0)) / total
    rows, columns = table.shape
    phi = max(0, ((table - expected) ** 2 / expected).sum() / total - (rows - 1) * (columns - 1) / (total - 1))
    rows, columns = rows - (rows - 1) ** 2 / (total - 1), columns - (columns - 1) ** 2 / (total - 1)
    return (phi / (min(rows, columns) - 1)) ** 0.5


@pytest.mark.parametrize("table", [[[95, 5], [5, 95]], [[10, 20, 30], [30, 20, 10]], [[4, 0], [1, 3], [0, 9]]])
def test_formula(table):
    assert cramers_v(torch.tensor(table)) == pytest.approx(bergsma(table))


def test_few_samples_of_independent_groups_do_not_tell():
    draw = np.random.default_rng(0)
    values = [
        cramers_v(torch.from_numpy(np.histogram2d(*draw.integers(0, 4, (2, 40)), bins=4, range=[[0, 4]] * 2)[0]))
        for _ in range(200)
    ]
    assert np.quantile(values, 0.99) < 0.5
    assert np.median(values) < 0.15


@pytest.mark.parametrize(
    "table", [[[3, 4]], [[3], [4]], [[3, 4], [0, 0]], [[1, 0], [0, 0]], [[0, 0]], [[1, 0], [0, 1]]]
)
def test_what_cannot_tell_is_zero(table):
    assert cramers_v(torch.tensor(table)) == 0.0
