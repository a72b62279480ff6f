"""Attention mass and lift against loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attn_callbacks.functional import attention_lift, attention_mass, target_share


def loop_mass(weights, target, valid, row_valid):
    batch, heads, rows, keys = weights.shape
    output = np.full((batch, heads), np.nan)
    for b in range(batch):
        for h in range(heads):
            inside = total = 0.0
            for r in range(rows):
                for j in range(keys):
                    if row_valid[b, r] and valid[b, j]:
                        total += weights[b, h, r, j]
                        inside += weights[b, h, r, j] * target[b, j]
            if total:
                output[b, h] = inside / total
    return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mass_matches_loops(dtype):
    generator = np.random.default_rng(1)
    weights = torch.tensor(generator.dirichlet(np.ones(6), size=(3, 2, 4))).to(dtype)
    target, valid = generator.random((2, 3, 6)) < 0.5
    row_valid = generator.random((3, 4)) < 0.7
    valid[2] = False
    result = attention_mass(weights, *map(torch.tensor, (target, valid)), row_valid=torch.tensor(row_valid))
    expected = loop_mass(weights.double().numpy(), target, valid, row_valid)
    assert np.isnan(expected[2]).all()
    assert not np.isnan(expected[:2]).any()
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-6)


def test_mass_without_masks_counts_all_rows_and_keys():
    weights = torch.tensor([[[[0.5, 0.25, 0.25], [0.5, 0.5, 0.0]]]])
    torch.testing.assert_close(attention_mass(weights, torch.tensor([[False, True, True]])), torch.tensor([[0.5]]))


def test_mass_is_differentiable():
    weights = torch.full((1, 1, 1, 2), 0.5, requires_grad=True)
    attention_mass(weights, torch.tensor([[True, False]])).sum().backward()
    torch.testing.assert_close(weights.grad, torch.tensor([[[[0.5, -0.5]]]]))


def test_lift_uniform_attention_is_one_whatever_is_padded():
    weights = torch.full((1, 2, 5, 5), 0.2)
    target = torch.tensor([[True, False, True, True, False]])
    valid = torch.tensor([[True, True, True, False, False]])
    torch.testing.assert_close(attention_lift(weights, target, valid), torch.ones(1, 2))
    torch.testing.assert_close(target_share(target, valid), torch.tensor([2 / 3]))


def test_lift_is_mass_over_share():
    weights = torch.tensor([[[[0.7, 0.1, 0.1, 0.1]]]])
    target = torch.tensor([[True, False, False, False]])
    torch.testing.assert_close(attention_lift(weights, target), torch.tensor([[2.8]]))


def test_empty_set_has_no_mass_and_no_lift():
    weights, empty = torch.full((1, 1, 2, 2), 0.5), torch.zeros(1, 2, dtype=torch.bool)
    assert attention_mass(weights, empty).item() == 0.0
    assert attention_lift(weights, empty).isnan().all()
    assert target_share(empty, empty).isnan().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": torch.ones(2, 2)}, "`weights` must have 4 axes"),
        ({"target_mask": torch.ones(1, 2)}, r"`target_mask` must have shape \(batch, keys\) = \(1, 3\), got \(1, 2\)"),
        ({"valid": torch.ones(3)}, r"`valid` must have shape \(batch, keys\) = \(1, 3\), got \(3,\)"),
        ({"row_valid": torch.ones(1, 3)}, r"`row_valid` must have shape \(batch, rows\) = \(1, 2\), got \(1, 3\)"),
    ],
)
def test_mass_wrong_shape_raises(arguments, message):
    with pytest.raises(ValueError, match=message):
        attention_mass(**{"weights": torch.ones(1, 1, 2, 3), "target_mask": torch.ones(1, 3), **arguments})
