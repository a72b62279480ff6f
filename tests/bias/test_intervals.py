"""Intervals against scipy, published figures, and plain numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from attn_callbacks.bias.intervals import deviations, normal_interval, paired_interval, wilson_interval


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
@pytest.mark.parametrize(("hits", "size"), [(0, 1), (1, 1), (0, 20), (3, 7), (50, 100), (999, 1000), (20, 20)])
def test_wilson_equals_scipy(hits, size, level):
    expected = stats.binomtest(hits, size).proportion_ci(level, method="wilson")
    got = wilson_interval(torch.tensor(hits), torch.tensor(size), level)
    assert got.dtype == torch.float64
    assert got.tolist() == pytest.approx([expected.low, expected.high], abs=1e-12)


def test_wilson_keeps_axes_and_has_nothing_without_samples():
    got = wilson_interval(torch.tensor([[1, 0, 5]]), torch.tensor([[2, 0, 5]]))
    assert got.shape == (1, 3, 2)
    assert got[0, 1].isnan().all()
    assert not got[0, ::2].isnan().any()


def test_normal_interval_equals_scipy():
    low, high = normal_interval(torch.tensor(0.3), torch.tensor(0.1), 0.9).tolist()
    assert (low, high) == pytest.approx(stats.norm(0.3, 0.1).interval(0.9))
    assert deviations() == pytest.approx(1.959963984540054)


def newcombe_paired(neither, gained, lost, both, z=1.959963984540054):
    """Method 10 as the paper writes it: r cells e, f, g, h and the corrected phi."""

    def wilson(hits, n):
        centre, half = 2 * hits + z * z, z * math.sqrt(z * z + 4 * hits * (1 - hits / n))
        return (centre - half) / (2 * (n + z * z)), (centre + half) / (2 * (n + z * z))

    n = neither + gained + lost + both
    p1, p2 = (both + lost) / n, (both + gained) / n
    (l1, u1), (l2, u2) = wilson(both + lost, n), wilson(both + gained, n)
    product = (both + lost) * (neither + gained) * (both + gained) * (neither + lost)
    cross = both * neither - lost * gained
    cross = max(cross - n / 2, 0) if cross > 0 else cross
    phi = cross / math.sqrt(product) if product else 0.0
    down = math.sqrt((p1 - l1) ** 2 - 2 * phi * (p1 - l1) * (u2 - p2) + (u2 - p2) ** 2)
    up = math.sqrt((p2 - l2) ** 2 - 2 * phi * (p2 - l2) * (u1 - p1) + (u1 - p1) ** 2)
    return p1 - p2 - down, p1 - p2 + up


@pytest.mark.parametrize(
    "cells", [(0, 2, 12, 36), (10, 0, 0, 40), (0, 0, 0, 30), (3, 5, 9, 80), (40, 1, 30, 29), (20, 0, 0, 0)]
)
def test_paired_interval_against_the_formula(cells):
    got = paired_interval(torch.tensor(cells).reshape(2, 2)).tolist()
    assert got == pytest.approx(newcombe_paired(*cells), abs=1e-12)


def test_paired_interval_as_published():
    # Newcombe 1998, table II, row (e, f, g, h) = (36, 12, 2, 0), method 10
    assert paired_interval(torch.tensor([[0, 2], [12, 36]])).tolist() == pytest.approx([0.0569, 0.3404], abs=5e-5)


def test_paired_interval_is_narrower_for_agreeing_looks():
    """30 samples lost of 100: the rest stays as it was, or changes to and fro."""
    steady = paired_interval(torch.tensor([[20, 0], [30, 50]]))
    restless = paired_interval(torch.tensor([[0, 20], [50, 30]]))
    assert float(steady[1] - steady[0]) < 0.8 * float(restless[1] - restless[0])


def test_paired_interval_covers():
    generator = np.random.default_rng(0)
    shares, size = [0.1, 0.05, 0.15, 0.7], 60
    counts = torch.from_numpy(generator.multinomial(size, shares, size=2000)).reshape(-1, 2, 2)
    low, high = paired_interval(counts).unbind(dim=1)
    assert 0.94 < float(((low <= 0.1) & (high >= 0.1)).double().mean()) < 0.985


def test_paired_interval_without_samples():
    assert paired_interval(torch.zeros(3, 2, 2)).isnan().all()
