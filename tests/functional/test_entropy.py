"""Head entropy on attention of known form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from attn_callbacks.functional import head_entropy


def test_head_entropy_uniform_is_log_keys_and_identity_is_zero():
    attention = torch.stack([torch.full((5, 5), 0.2), torch.eye(5)])[None]
    torch.testing.assert_close(head_entropy(attention), torch.tensor([[math.log(5), 0.0]]))


def test_head_entropy_matches_numpy_over_allowed_rows():
    generator = np.random.default_rng(0)
    attention = generator.dirichlet(np.ones(6), size=(2, 3, 4))
    mask = np.ones((2, 1, 4, 6), dtype=bool)
    mask[1, 0, 2:] = False
    rows = -(attention * np.log(attention)).sum(axis=-1)
    expected = np.stack([rows[0].mean(axis=-1), rows[1, :, :2].mean(axis=-1)])
    result = head_entropy(torch.tensor(attention), torch.tensor(mask))
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-6)


def test_head_entropy_leaves_rows_of_zeros_out():
    attention = torch.tensor([[[[0.5, 0.5], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]]])
    torch.testing.assert_close(head_entropy(attention), torch.tensor([[math.log(2), math.nan]]), equal_nan=True)


def test_head_entropy_has_a_finite_gradient_at_zero_weights():
    attention = torch.tensor([[[[1.0, 0.0], [0.25, 0.75]]]], requires_grad=True)
    head_entropy(attention).sum().backward()
    assert attention.grad.isfinite().all()
    torch.testing.assert_close(attention.grad[0, 0, 1], -(torch.tensor([0.25, 0.75]).log() + 1) / 2)


def test_head_entropy_wrong_axes_raises():
    with pytest.raises(ValueError, match="`attention` must have 4 axes"):
        head_entropy(torch.ones(2, 2))
