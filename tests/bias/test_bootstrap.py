"""The bootstrap of counts against scipy's, and what it promises: equal everywhere, quiet, never certain for nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from attn_callbacks.bias import bootstrap
from attn_callbacks.bias.bootstrap import bootstrap_interval, margins_interval, margins_of


def worst(table):
    rates = table[..., 0] / table.sum(dim=-1)
    return rates.amin(dim=-1)


def macro_f1(table):
    hits = table.diagonal(dim1=1, dim2=2)
    return (2 * hits / (table.sum(dim=1) + table.sum(dim=2))).mean(dim=-1)


def macro_f1_of_margins(margins):
    return (2 * margins.hits / (margins.support + margins.predicted))[:, 0].mean(dim=-1)


def of_samples(counts, statistic):
    """The same statistic of drawn sample indices, for scipy."""
    cells = np.repeat(np.arange(counts.numel()), counts.flatten().numpy())

    def compute(drawn, axis):
        tables = np.apply_along_axis(np.bincount, axis, drawn, minlength=counts.numel())
        return statistic(torch.from_numpy(tables).double().reshape(-1, *counts.shape)).numpy().reshape(drawn.shape[:-1])

    return cells, compute


@pytest.mark.parametrize(
    ("counts", "statistic"),
    [
        (torch.tensor([[90, 10], [30, 20], [45, 5]]), worst),
        (torch.tensor([[40, 8, 2], [9, 30, 6], [1, 4, 12]]), macro_f1),
    ],
    ids=["worst", "macro-F1"],
)
def test_interval_equals_scipy(counts, statistic):
    cells, compute = of_samples(counts, statistic)

    def interval(method):
        found = stats.bootstrap(
            (cells,), compute, n_resamples=4000, batch=1000, method=method, rng=np.random.default_rng(1)
        ).confidence_interval
        return float(found.low), float(found.high)

    percentile, basic = interval("percentile"), interval("basic")
    expected = min(percentile[0], basic[0]), max(percentile[1], basic[1])
    assert bootstrap_interval(counts, statistic) == pytest.approx(expected, abs=0.012)


def test_interval_holds_the_value_and_covers_a_selected_worst():
    """The worst of two equal groups is low by selection; the percentile interval alone would cover 0.8 too seldom."""
    generator, covered = np.random.default_rng(0), 0
    for hits in generator.binomial(100, 0.8, size=(100, 4)):
        table = torch.from_numpy(np.stack([hits, 100 - hits], axis=1))
        low, high = bootstrap_interval(table, worst)
        assert low <= hits.min() / 100 <= high
        covered += low <= 0.8 <= high
    assert covered >= 85


def test_equal_counts_give_equal_intervals_and_touch_no_generator():
    counts = torch.tensor([[5, 3], [2, 9]])
    torch.manual_seed(1)
    np.random.seed(1)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = bootstrap_interval(counts, worst)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    torch.manual_seed(2)
    assert bootstrap_interval(counts.clone(), worst) == first


def test_chunks_do_not_change_it(monkeypatch):
    counts = torch.tensor([[5, 3], [2, 9]])
    whole = bootstrap_interval(counts, worst)
    monkeypatch.setattr(bootstrap, "_CHUNK", 28)
    assert bootstrap_interval(counts, worst) == whole


def test_large_tables_take_fewer_draws(monkeypatch):
    sizes = []
    monkeypatch.setattr(bootstrap, "_ALL_CELLS", 1200)

    def count(table):
        sizes.append(len(table))
        return worst(table)

    bootstrap_interval(torch.tensor([[5, 3], [2, 9]]), count)
    assert sizes == [1, 300]  # the value itself, then the draws
    sizes.clear()
    bootstrap_interval(torch.ones(300, 2, dtype=torch.int64), count)
    assert sum(sizes[1:]) == 200
    monkeypatch.setattr(bootstrap, "_MOST_CELLS", 3)
    assert all(map(math.isnan, bootstrap_interval(torch.tensor([[5, 3], [2, 9]]), worst)))


def test_margins_are_those_of_the_drawn_tables():
    """The same cells in the same order: drawing margins and drawing whole tables is one thing."""
    counts = torch.tensor([[[40, 8, 2], [9, 30, 6], [1, 4, 12]]])
    whole = bootstrap_interval(counts[0], macro_f1)
    assert margins_interval(counts, macro_f1_of_margins) == pytest.approx(whole, abs=1e-12)
    for margin, expected in zip(margins_of(counts), ([40, 30, 12], [50, 45, 17], [50, 42, 20]), strict=True):
        assert margin.tolist() == [expected]


def test_smoothing_keeps_a_perfect_rate_uncertain():
    perfect = torch.tensor([[30, 0], [30, 0]])
    assert bootstrap_interval(perfect, worst) == (1.0, 1.0)
    low, high = bootstrap_interval(perfect, worst, smoothing=0.5)
    assert 0.85 < low < 0.97
    assert high == 1.0


def test_bounds_hold():
    low, high = bootstrap_interval(torch.tensor([[1, 19], [3, 17]]), worst, bounds=(0.02, 0.08))
    assert (low, high) == (0.02, 0.08)


def test_nothing_measured_is_nan():
    assert all(map(math.isnan, bootstrap_interval(torch.zeros(2, 2), worst)))
    assert all(
        map(math.isnan, bootstrap_interval(torch.tensor([[5, 5], [0, 0]]), lambda t: t[:, 1, 0] / t[:, 1].sum(-1)))
    )
