"""Effect sizes against scipy and plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from attn_callbacks.functional._student import student_p
from attn_callbacks.functional.effect_size import Moments, effect_size, moments


def hedges(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """g and its standard error, from the definitions."""
    n, m = len(first), len(second)
    pooled = ((n - 1) * first.var(ddof=1) + (m - 1) * second.var(ddof=1)) / (n + m - 2)
    d = (first.mean() - second.mean()) / math.sqrt(pooled)
    freedom = n + m - 2
    correction = math.gamma(freedom / 2) / (math.sqrt(freedom / 2) * math.gamma((freedom - 1) / 2))
    return correction * d, correction * math.sqrt((n + m) / (n * m) + d**2 / (2 * (n + m)))


def test_every_cell_against_scipy_and_loops() -> None:
    stats = pytest.importorskip("scipy.stats")
    source = np.random.default_rng(0)
    first, second = source.normal(0.4, 2.0, (9, 3, 2, 4)), source.normal(0.0, 0.5, (40, 3, 2, 4))
    found = effect_size(moments(torch.from_numpy(first)), moments(torch.from_numpy(second)))
    for cell in np.ndindex(3, 2, 4):
        a, b = (group[(slice(None), *cell)] for group in (first, second))
        g, error = hedges(a, b)
        assert float(found.g[cell]) == pytest.approx(g)
        assert float(found.standard_error[cell]) == pytest.approx(error)
        assert float(found.high[cell]) == pytest.approx(g + 1.959963985 * error)
        assert float(found.low[cell]) == pytest.approx(g - 1.959963985 * error)
        assert float(found.difference[cell]) == pytest.approx(a.mean() - b.mean())
        expected = stats.ttest_ind(a, b, equal_var=False).pvalue
        assert float(found.p_value[cell]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("degrees", [1.0, 1.5, 3.0, 10.0, 99.0, 101.0, 1000.0, 9e4])
def test_student_against_scipy(degrees: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    t = torch.tensor([0.0, 1e-4, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0], dtype=torch.float64)
    found = student_p(t, torch.tensor(degrees, dtype=torch.float64))
    np.testing.assert_allclose(found, 2 * stats.t.sf(t.numpy(), degrees), rtol=1e-11)
    assert torch.equal(found, student_p(-t, torch.tensor(degrees, dtype=torch.float64)))


@pytest.mark.parametrize("degrees", [1.0, 5.0, 1000.0, 9e4])
def test_student_near_nothing_is_a_straight_line(degrees: float) -> None:
    """Twice the density at zero, where scipy itself is off by 1e-9 for one degree of freedom."""
    peak = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
    t = torch.tensor([1e-9, 1e-7, 1e-6, 1e-5], dtype=torch.float64)
    found = student_p(t, torch.tensor(degrees, dtype=torch.float64))
    np.testing.assert_allclose(found, 1 - 2 * peak * t, rtol=0, atol=1e-14)


def test_moments_add_up_and_leave_out_nan() -> None:
    values = torch.randn(20, 3, dtype=torch.float64)
    values[4, 1] = torch.nan
    parts = [moments(part) for part in values.split([7, 13])]
    both = Moments(*(sum(fields) for fields in zip(*parts, strict=True)))
    for one, other in zip(both, moments(values), strict=True):
        torch.testing.assert_close(one, other)
    assert both.samples.tolist() == [20, 19, 20]


def test_too_few_samples_are_nan_and_equal_values_no_effect() -> None:
    one, two = moments(torch.tensor([1.0])), moments(torch.tensor([1.0, 2.0]))
    assert all(field.isnan() for field in effect_size(one, two))
    # as float32 rounds a third, in one group up and in the other down: no difference beyond rounding
    third = torch.full((50,), 1 / 3)
    found = effect_size(moments(third), moments(torch.nextafter(third, torch.tensor(1.0))))
    assert abs(float(found.g)) < 0.2
    assert float(found.p_value) > 0.1
    assert float(effect_size(moments(torch.zeros(5)), moments(torch.zeros(5))).g) == 0.0
    assert float(effect_size(moments(torch.zeros(5)), moments(torch.ones(5))).p_value) < 1e-6


def test_interval_covers_the_true_effect() -> None:
    source = torch.Generator().manual_seed(0)
    first = torch.randn(15, 4000, generator=source, dtype=torch.float64) + 0.5
    found = effect_size(moments(first), moments(torch.randn(25, 4000, generator=source, dtype=torch.float64)))
    inside = (found.low <= 0.5) & (found.high >= 0.5)
    assert float(inside.double().mean()) == pytest.approx(0.95, abs=0.015)
    assert float(found.g.mean()) == pytest.approx(0.5, abs=0.02)  # unbiased


def test_confidence_is_checked() -> None:
    group = moments(torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match="`confidence` must lie between 0 and 1"):
        effect_size(group, group, confidence=1.0)
