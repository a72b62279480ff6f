"""CVaR against the minimum of Rockafellar and Uryasev, and its limits: the mean and the maximum."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from losses.groups import CVaRLoss, cvar_loss
from tests.losses.groups.reference import sample_losses


def reference(losses, alpha):
    """Minimise over the threshold; the minimum of a piecewise linear convex function lies at a corner."""
    losses = np.array([loss for loss in losses if loss is not None])
    return min((at + np.maximum(losses - at, 0).sum() / (alpha * len(losses)) for at in losses), default=0.0)


def with_losses(values):
    """Return logits and targets of two classes whose cross entropies are ``values``."""
    other = torch.log(torch.expm1(torch.tensor(values, dtype=torch.float64)))
    return torch.stack([torch.zeros_like(other), other], dim=1).requires_grad_(), torch.zeros(
        len(values), dtype=torch.long
    )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    samples=st.integers(0, 9),
    alpha=st.floats(0.01, 1.0),
    positions=st.sampled_from([(), (3,)]),
    ignored=st.integers(0, 8),
    seed=st.integers(0, 99),
)
def test_equals_the_minimum_over_thresholds(samples, alpha, positions, ignored, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(samples, 4, *positions, generator=generator).double()
    target = torch.randint(4, (samples, *positions), generator=generator)
    target.view(-1)[:ignored] = -100
    options = {
        "group": torch.randint(2, (samples,), generator=generator),
        "sample_weight": torch.rand(samples, generator=generator).double(),
        "class_weight": torch.rand(2, 4, generator=generator).double(),
    }
    expected = reference(sample_losses(logits, target, **options), alpha)
    assert cvar_loss(logits, target, alpha=alpha, **options).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("alpha", "weights"),
    [(0.5, [0, 0, 1, 1]), (0.6, [0, 0.4, 1, 1]), (0.25, [0, 0, 0, 1]), (0.1, [0, 0, 0, 0.4]), (1, [1, 1, 1, 1])],
)
def test_the_boundary_sample_counts_by_its_fraction(alpha, weights):
    values, order = [0.1, 0.7, 1.5, 4.0], [2, 0, 3, 1]
    logits, target = with_losses([values[i] for i in order])
    loss = cvar_loss(logits, target, alpha=alpha)
    loss.backward()
    assert loss.item() == pytest.approx(np.dot(values, weights) / (4 * alpha))
    single = torch.autograd.grad(F.cross_entropy(logits, target, reduction="sum"), logits)[0]
    expected = single * torch.tensor([weights[i] for i in order])[:, None] / (4 * alpha)
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize("positions", [(), (3,)])
def test_all_samples_are_cross_entropy(positions):
    logits, target = torch.randn(7, 4, *positions), torch.randint(4, (7, *positions))
    target[2] = -100
    torch.testing.assert_close(cvar_loss(logits, target, alpha=1), F.cross_entropy(logits, target))


def test_a_small_share_is_the_maximum():
    logits, target = torch.randn(7, 4), torch.randint(4, (7,))
    expected = F.cross_entropy(logits, target, reduction="none").max()
    torch.testing.assert_close(cvar_loss(logits, target, alpha=1e-6), expected)


def test_ignored_samples_are_not_part_of_the_share():
    logits, target = with_losses([1.0, 2.0, 3.0, 9.0])
    target[3] = -100
    assert cvar_loss(logits, target, alpha=2 / 3).item() == pytest.approx(2.5)


def test_ignored_samples_do_not_push_out_those_without_a_loss():
    logits = torch.tensor([[40.0, 0.0], [40.0, 0.0]], requires_grad=True)
    cvar_loss(logits, torch.tensor([-100, 0]), alpha=1).backward()
    assert logits.grad.ne(0).any(dim=1).tolist() == [False, True]


def test_soft_targets():
    logits, target = torch.randn(6, 4, 2), torch.randn(6, 4, 2).softmax(1)
    expected = reference(sample_losses(logits, target), 0.4)
    assert cvar_loss(logits, target, alpha=0.4).item() == pytest.approx(expected, rel=1e-5)


def test_the_mean_is_that_of_the_values():
    logits, target = torch.randn(7, 3, 2), torch.randint(3, (7, 2))
    target[3] = -100
    losses = {name: CVaRLoss(0.3, reduction=name)(logits, target) for name in ("none", "mean", "sum")}
    assert losses["none"].shape == (7,)
    torch.testing.assert_close(losses["none"].sum() / 6, losses["mean"])
    torch.testing.assert_close(losses["none"].sum(), losses["sum"])


def test_gradcheck():
    logits, target = torch.randn(6, 3, 2).double().requires_grad_(), torch.randint(3, (6, 2))
    assert torch.autograd.gradcheck(lambda z: cvar_loss(z, target, alpha=0.4), (logits,))


def test_equal_losses_give_their_value():
    logits = torch.zeros(5, 2, requires_grad=True)
    loss = cvar_loss(logits, torch.zeros(5, dtype=torch.long), alpha=0.3)
    loss.backward()
    assert loss.item() == pytest.approx(np.log(2))
    assert logits.grad.isfinite().all()


def test_repr_builds_it_again():
    criterion = CVaRLoss(0.3, class_weight=torch.ones(2, 3), num_groups=2)
    assert repr(criterion) == "CVaRLoss(alpha=0.3, num_groups=2, reduction='mean', ignore_index=-100)"
    assert repr(CVaRLoss()) == "CVaRLoss(alpha=0.1, reduction='mean', ignore_index=-100)"


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        (0, r"`alpha` must be a finite number, above 0, up to 1, got 0"),
        (-0.1, r"`alpha` must be a finite number, above 0, up to 1, got -0.1"),
        (1.1, r"`alpha` must be a finite number, above 0, up to 1, got 1.1"),
        (torch.nan, r"`alpha` must be a finite number"),
    ],
)
def test_alpha_is_checked(alpha, message):
    with pytest.raises(ValueError, match=message):
        CVaRLoss(alpha)
    with pytest.raises(ValueError, match=message):
        cvar_loss(torch.zeros(2, 3), torch.tensor([0, 1]), alpha=alpha)


def test_class_weights_need_a_fitting_shape():
    with pytest.raises(ValueError, match=r"must have shape \(3,\), got \(2, 3\)"):
        CVaRLoss(class_weight=torch.ones(2, 3))
