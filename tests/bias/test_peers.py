"""Shortfalls: intervals as published, p-values that agree with them and with exact tests."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from attn_callbacks.bias import peers
from attn_callbacks.bias.peers import shortfall_interval, shortfall_p


def rates_of(hits, support):
    hits, support = torch.tensor(hits), torch.tensor(support)
    return hits / support.clamp(min=1).double(), support


def everyone(rates):
    return torch.ones_like(rates, dtype=torch.bool)


@pytest.mark.parametrize(
    ("pair", "expected"),
    [  # Newcombe 1998, table II, method 10
        (((56, 70), (48, 80)), (0.0524, 0.3339)),
        (((9, 10), (3, 10)), (0.1705, 0.8090)),
        (((5, 56), (0, 29)), (-0.0381, 0.1926)),
        (((10, 10), (0, 10)), (0.6075, 1.0)),
    ],
)
def test_interval_of_two_as_published(pair, expected):
    (high, of_high), (low, of_low) = pair
    rates, support = rates_of([high, low], [of_high, of_low])
    got = shortfall_interval(rates, support, everyone(rates))
    assert got[1].tolist() == pytest.approx(expected, abs=6e-5)
    assert got[0].tolist() == pytest.approx([-expected[1], -expected[0]], abs=6e-5)  # the mirror image


def wilson(rate, size, z):
    interval = stats.binomtest(round(rate * size), size).proportion_ci(1 - 2 * stats.norm.sf(z), method="wilson")
    return interval.low, interval.high


def by_loops(rates, support, estimable, z):
    """Size, and both sides, of each shortfall of one column."""
    found = []
    for index, rate in enumerate(rates):
        others = [k for k in range(len(rates)) if k != index and estimable[k]]
        if not estimable[index] or not others:
            found.append((math.nan,) * 3)
            continue
        low, high = wilson(rate, support[index], z)
        down, up = (high - rate) ** 2, (rate - low) ** 2
        for k in others:
            low, high = wilson(rates[k], support[k], z)
            down += ((rates[k] - low) / len(others)) ** 2
            up += ((high - rates[k]) / len(others)) ** 2
        size = np.mean([rates[k] for k in others]) - rate
        found.append((size, size - math.sqrt(down), size + math.sqrt(up)))
    return np.array(found)


def draw(rows=5, columns=3, seed=0):
    generator = np.random.default_rng(seed)
    support = generator.integers(0, 60, size=(rows, columns))
    hits = generator.binomial(support, generator.uniform(0.2, 1, size=(rows, columns)))
    return hits / np.maximum(support, 1), support, support >= 10


def test_interval_of_many_against_loops():
    rates, support, estimable = draw()
    got = shortfall_interval(*map(torch.from_numpy, (rates, support, estimable))).numpy()
    for column in range(3):
        expected = by_loops(rates[:, column], support[:, column], estimable[:, column], 1.959963984540054)
        np.testing.assert_allclose(got[:, column], expected[:, 1:], atol=1e-10)


def test_p_is_the_level_at_which_the_interval_reaches_zero():
    rates, support, estimable = draw(seed=1)
    got = shortfall_p(*map(torch.from_numpy, (rates, support, estimable))).numpy()
    compared = 0
    for column in range(3):
        arguments = rates[:, column], support[:, column], estimable[:, column]
        size = by_loops(*arguments, 1.0)[:, 0]
        for row in range(5):
            if math.isnan(size[row]):
                assert math.isnan(got[row, column])
            elif size[row] <= 0:
                assert got[row, column] == 1
            else:
                z = stats.norm.isf(got[row, column])
                lower = by_loops(*arguments, z)[row, 1]
                assert lower == pytest.approx(0, abs=1e-4)
                compared += 1
    assert compared > 4


@pytest.mark.parametrize(
    ("own", "peer"),
    [((11, 20), (20, 20)), ((0, 20), (5, 20)), ((60, 100), (80, 100)), ((5, 30), (15, 30)), ((2, 20), (20, 25))],
)
def test_p_is_near_exact_tests(own, peer):
    rates, support = rates_of([own[0], peer[0]], [own[1], peer[1]])
    p = float(shortfall_p(rates, support, everyone(rates))[0])
    table = [[own[0], own[1] - own[0]], [peer[0], peer[1] - peer[0]]]
    fisher = stats.fisher_exact(table, alternative="less").pvalue  # conservative
    barnard = stats.barnard_exact(table, alternative="less").pvalue
    assert 0.3 * min(fisher, barnard) < p < 2 * max(fisher, barnard)


def test_p_of_a_known_peer_is_the_score_test():
    rates, support = rates_of([0, 200_000_000], [20, 1_000_000_000])
    p = float(shortfall_p(rates, support, everyone(rates))[0])
    assert p == pytest.approx(stats.norm.sf(0.2 / math.sqrt(0.2 * 0.8 / 20)), rel=1e-3)


def test_chunks_do_not_change_it(monkeypatch):
    arguments = [*map(torch.from_numpy, draw(seed=2))]
    whole = shortfall_p(*arguments)
    monkeypatch.setattr(peers, "_CHUNK", 1500)
    torch.testing.assert_close(shortfall_p(*arguments), whole, rtol=0, atol=0, equal_nan=True)


def test_certain_cases_stay_finite():
    rates, support = rates_of([0, 10**9, 0], [10**9, 10**9, 0])
    p = shortfall_p(rates, support, support > 0)
    assert 0 <= float(p[0]) < 1e-200
    assert float(p[1]) == 1.0
    assert math.isnan(p[2])
