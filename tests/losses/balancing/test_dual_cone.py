"""The projection behind UPGrad against an independent solver, and where gradients are degenerate."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls

from losses.balancing._dual_cone import project_weights


def projected(rows):
    """Return the projection of every row, ``(tasks, elements)``."""
    return project_weights(torch.eye(len(rows), dtype=rows.dtype), rows @ rows.T) @ rows


@settings(max_examples=25, deadline=None, derandomize=True)
@given(tasks=st.integers(1, 6), elements=st.integers(1, 8), seed=st.integers(0, 999), spread=st.sampled_from([0, 3]))
def test_against_non_negative_least_squares(tasks, elements, seed, spread):
    draw = np.random.default_rng(seed)
    rows = draw.normal(size=(tasks, elements)) * 10.0 ** draw.uniform(-spread, spread, (tasks, 1))
    given = projected(torch.tensor(rows)).numpy()
    for k, row in enumerate(rows):
        addition, _ = nnls((rows / np.linalg.norm(rows, axis=1)[:, None]).T, -row)
        expected = row + addition @ (rows / np.linalg.norm(rows, axis=1)[:, None])
        np.testing.assert_allclose(given[k], expected, atol=5e-3 * np.linalg.norm(row))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(tasks=st.integers(2, 6), elements=st.integers(2, 30), seed=st.integers(0, 999))
def test_no_projection_works_against_a_task(tasks, elements, seed):
    rows = torch.randn(tasks, elements, generator=torch.Generator().manual_seed(seed))
    products = projected(rows) @ rows.T
    assert products.min() > -1e-4 * rows.norm(dim=1).max() ** 2


def test_rows_without_conflict_stay():
    rows = torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(projected(rows), rows)


def test_opposite_rows_cancel():
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    torch.testing.assert_close(projected(rows), torch.zeros(2, 2), rtol=0, atol=1e-5)
    torch.testing.assert_close(projected(1e4 * rows), torch.zeros(2, 2), rtol=0, atol=1e-1)


def test_two_rows_by_hand():
    rows = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
    torch.testing.assert_close(projected(rows), torch.tensor([[0.5, 0.5], [0.0, 1.0]]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_what_overflowed_stays_so(bad):
    gramian = torch.tensor([[1.0, bad], [bad, 1.0]])
    assert project_weights(torch.eye(2), gramian).isnan().all()


@pytest.mark.parametrize("seed", [9, 32, 35, 276])
def test_rows_that_nearly_repeat_get_moderate_weights(seed):
    """What float32 leaves of their Gramian is singular (the last seed), or asks for weights in the hundreds."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(3, 200, generator=generator)
    opposite = 1e-4 * torch.randn(1, 200, generator=generator) - rows[:1]
    rows = torch.cat([rows, 2 * rows[:2], opposite])
    weights = project_weights(torch.eye(6), rows @ rows.T)
    assert weights.abs().max() < 50
    assert (weights @ rows @ rows.T).min() > -1e-3 * rows.norm(dim=1).max() ** 2
