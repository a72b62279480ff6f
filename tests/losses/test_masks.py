"""The one rule by which a mask lies on inputs, and that all who take such a mask follow it."""

from __future__ import annotations

import pytest
import torch

from losses._masks import aligned_mask, feature_axis
from losses.adversarial import PGD, fgm_perturbation
from losses.reliance.input_gradient import input_gradient_penalty
from losses.reliance.mask_randomization import randomize_masked

SHAPES = [
    ((4, 3), [(4, 3), (1, 3), (4, 1), (1, 1)]),
    ((4, 3, 2), [(4, 3, 2), (4, 3), (1, 3), (4, 1), (4, 3, 1), (1, 3, 2), (1, 1, 2)]),
    ((4, 2, 3, 5), [(4, 2, 3, 5), (4, 3, 5), (1, 3, 5), (4, 1, 5), (4, 1, 3, 5), (1, 1, 3, 5), (1, 2, 1, 1)]),
    ((3, 3, 3, 3), [(3, 3, 3), (1, 3, 3)]),
]
FITTING = [(inputs, mask) for inputs, masks in SHAPES for mask in masks]
REFUSED = [
    ((4, 3), (4,)),
    ((4, 3), (3,)),
    ((4, 3, 2), (3, 2)),
    ((4, 3, 2), (4, 2)),
    ((4, 2, 3, 5), (4, 2, 3)),
    ((4, 2, 3, 5), (3, 5)),
    ((4, 2, 3, 5), (1, 4, 2, 3, 5)),
]


def moved(inputs, mask):
    return fgm_perturbation(lambda x: x.sum(), inputs, mask=mask)


def moved_within_bounds(inputs, mask):
    return PGD(0.1, norm="linf", bounds=(-9, 9))(lambda x: (x - inputs).mul(weights(inputs)).sum(), inputs, mask)


def randomized(inputs, mask):
    return randomize_masked(inputs, mask, generator=torch.Generator().manual_seed(0))


def penalised(inputs, mask):
    inputs = inputs.clone().requires_grad_()
    flat = (inputs * weights(inputs)).flatten(1)
    return input_gradient_penalty(torch.stack([flat.square().sum(dim=1), flat.sum(dim=1)], dim=1), inputs, mask)


def weights(inputs):
    return torch.arange(1.0, 1 + inputs.numel()).reshape(inputs.shape)


USERS = [moved, moved_within_bounds, randomized, penalised]


def written_out(mask, shape):
    """Return the mask in the shape of the inputs: what has an axis less lacks the last, or the second of four."""
    if mask.dim() < len(shape):
        mask = mask[:, None] if len(shape) == 4 else mask[..., None]
    return mask.expand(shape)


@pytest.mark.parametrize(("shape", "mask_shape"), FITTING)
@pytest.mark.parametrize("use", USERS)
def test_all_read_a_mask_alike(use, shape, mask_shape):
    inputs, mask = torch.randn(shape), torch.rand(mask_shape) < 0.5
    mask.flatten()[0] = True
    full = written_out(mask, shape)
    torch.testing.assert_close(use(inputs, mask), use(inputs, full))
    torch.testing.assert_close(use(inputs, mask.long()), use(inputs, full))


@pytest.mark.parametrize(("shape", "mask_shape"), REFUSED)
@pytest.mark.parametrize("use", USERS)
def test_all_refuse_a_mask_alike(use, shape, mask_shape):
    with pytest.raises(ValueError, match=r"mask` must have the shape of `inputs`, .* An axis of size one repeats"):
        use(torch.randn(shape), torch.ones(mask_shape))
    with pytest.raises(TypeError, match="mask` must be a tensor, got list"):
        use(torch.randn(shape), [True])


@pytest.mark.parametrize(("shape", "mask_shape"), FITTING)
def test_against_the_rule_written_out(shape, mask_shape):
    mask = torch.rand(mask_shape)
    aligned = aligned_mask("mask", mask, torch.zeros(shape))
    assert aligned.dim() == len(shape)
    assert torch.equal(aligned.expand(shape), written_out(mask, shape))


def test_the_axis_of_features():
    assert [feature_axis(torch.zeros([2] * axes)) for axes in (2, 3, 4, 5)] == [1, 2, 1, 1]
