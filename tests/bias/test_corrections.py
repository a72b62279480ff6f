"""p-values against scipy, and Holm's correction against the definition and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from attn_callbacks.bias.corrections import holm, normal_p


def test_normal_p_equals_scipy():
    z = np.array([-3.0, -0.5, 0.0, 1.0, 2.5, 8.0, 30.0])
    np.testing.assert_allclose(normal_p(torch.from_numpy(z)), 2 * stats.norm.sf(abs(z)), rtol=1e-12)
    np.testing.assert_allclose(normal_p(torch.from_numpy(z), two_sided=False), stats.norm.sf(z), rtol=1e-12)
    assert normal_p(torch.tensor([math.inf, math.nan])).nan_to_num(nan=-1.0).tolist() == [0.0, -1.0]


def test_holm_by_hand():
    # sorted: 0.005 x 4, 0.01 x 3, 0.03 x 2, 0.04 x 1; each at least as large as the one before
    got = holm(torch.tensor([0.01, 0.04, 0.03, 0.005], dtype=torch.float64))
    assert got.tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_is_at_most_one():
    assert holm(torch.tensor([0.4, 0.9, 0.6])).tolist() == [1.0, 1.0, 1.0]


def by_definition(p_values, comparisons):
    """Reject from the smallest on while p <= level / (how many are left); the least level that rejects each."""
    order, corrected, reached = np.argsort(p_values, kind="stable"), np.empty(len(p_values)), 0.0
    for rank, index in enumerate(order):
        reached = max(reached, min(1.0, p_values[index] * (comparisons - rank)))
        corrected[index] = reached
    return corrected


@pytest.mark.parametrize("extra", [0, 7])
def test_holm_against_its_definition(extra):
    p_values = np.random.default_rng(0).random(20) ** 4
    p_values[3] = p_values[8]
    got = holm(torch.from_numpy(p_values), len(p_values) + extra)
    np.testing.assert_allclose(got, by_definition(p_values, len(p_values) + extra), rtol=1e-12)


def test_what_was_not_compared_does_not_count():
    nan = math.nan
    got = holm(torch.tensor([[nan, 0.02], [0.01, nan]], dtype=torch.float64))
    assert got.isnan().tolist() == [[True, False], [False, True]]
    assert [float(got[0, 1]), float(got[1, 0])] == pytest.approx([0.02, 0.02])


def test_no_comparison():
    assert holm(torch.empty(0)).shape == (0,)
    assert holm(torch.full((3,), math.nan)).isnan().all()


def test_false_findings_stay_at_the_level():
    """Twenty true null hypotheses: uncorrected, two experiments in three would have a false finding."""
    p_values = torch.from_numpy(np.random.default_rng(0).random((2000, 20)))
    assert float((p_values < 0.05).any(dim=1).double().mean()) > 0.5
    corrected = torch.stack([holm(row) for row in p_values[:1000]])
    assert 0.03 < float((corrected < 0.05).any(dim=1).double().mean()) < 0.07
