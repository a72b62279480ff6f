"""The worst group against loops: which one it is, and that no other one gets a gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from losses.groups import WorstGroupLoss, worst_group_loss
from tests.losses.groups.reference import group_means, sample_losses


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    samples=st.integers(1, 7),
    groups=st.integers(1, 4),
    positions=st.sampled_from([(), (3,)]),
    ignored=st.integers(0, 8),
    seed=st.integers(0, 99),
)
def test_value_and_gradient_against_loops(samples, groups, positions, ignored, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(samples, 4, *positions, generator=generator).double().requires_grad_()
    target = torch.randint(4, (samples, *positions), generator=generator)
    target.view(-1)[:ignored] = -100
    options = {
        "group": torch.randint(groups, (samples,), generator=generator),
        "sample_weight": 0.1 + torch.rand(samples, generator=generator).double(),
        "class_weight": 0.1 + torch.rand(4, generator=generator).double(),
    }
    means = group_means(sample_losses(logits, target, **options), options["group"], groups)
    there = [-np.inf if mean is None else mean for mean in means]
    loss = worst_group_loss(logits, target, num_groups=groups, **options)
    loss.backward()
    assert loss.item() == pytest.approx(max(0.0, *there), rel=1e-6)
    moved = logits.grad.flatten(1).ne(0).any(dim=1)
    counted = target.reshape(samples, -1).ne(-100).any(dim=1)
    assert torch.equal(moved, counted & (options["group"] == int(np.argmax(there))))


def test_one_group_is_cross_entropy():
    logits, target = torch.randn(6, 3), torch.randint(3, (6,))
    loss = WorstGroupLoss(1)(logits, target, group=torch.zeros(6, dtype=torch.long))
    torch.testing.assert_close(loss, F.cross_entropy(logits, target))


def test_an_absent_group_is_never_the_worst():
    logits = torch.tensor([[40.0, 0.0]], requires_grad=True)  # a loss of zero, as an absent group would have
    worst_group_loss(logits, torch.tensor([0]), group=torch.tensor([2]), num_groups=3).backward()
    assert logits.grad.ne(0).any()
    heavier = worst_group_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([0]), group=torch.tensor([2]), num_groups=3)
    assert heavier.item() == pytest.approx(np.log1p(np.exp(-1.0)))


def test_of_equal_groups_the_first_counts():
    logits = torch.zeros(2, 2, requires_grad=True)
    worst_group_loss(logits, torch.tensor([0, 0]), group=torch.tensor([1, 0]), num_groups=2).backward()
    assert logits.grad.ne(0).any(dim=1).tolist() == [False, True]


def test_the_mean_is_that_of_the_values():
    logits, target, group = torch.randn(7, 3, 2), torch.randint(3, (7, 2)), torch.tensor([0, 0, 1, 1, 1, 2, 2])
    target[3] = -100
    losses = {
        reduction: WorstGroupLoss(3, reduction=reduction)(logits, target, group=group)
        for reduction in ("none", "mean", "sum")
    }
    assert losses["none"].shape == (7,)
    torch.testing.assert_close(losses["none"].sum() / 6, losses["mean"])
    torch.testing.assert_close(losses["none"].sum(), losses["sum"])


def test_gradcheck():
    logits, group = torch.randn(5, 3, 2).double().requires_grad_(), torch.tensor([0, 0, 1, 1, 2])
    target = torch.randint(3, (5, 2))
    assert torch.autograd.gradcheck(lambda z: worst_group_loss(z, target, group=group, num_groups=3), (logits,))


def test_a_broken_loss_is_not_hidden():
    logits = torch.tensor([[1.0, 0.0], [torch.nan, 0.0]])
    loss = worst_group_loss(logits, torch.tensor([0, 0]), group=torch.tensor([0, 1]), num_groups=2)
    assert loss.isnan()


def test_repr_builds_it_again():
    criterion = WorstGroupLoss(2, reduction="sum")
    assert repr(eval(repr(criterion))) == repr(criterion)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"group": None}, r"`group` is missing: pass `group=`, one group index per sample"),
        ({"group": torch.tensor([0, 2])}, r"`group` must lie between 0 and 1, got 2"),
        ({"num_groups": 0}, r"`num_groups` must be at least 1, got 0"),
        ({"reduction": "max"}, r"`reduction` must be one of"),
    ],
)
def test_call_checks(arguments, message):
    options = {"group": torch.tensor([0, 1]), "num_groups": 2, **arguments}
    with pytest.raises(ValueError, match=message):
        worst_group_loss(torch.zeros(2, 3), torch.tensor([0, 1]), **options)


def test_construction_checks():
    with pytest.raises(ValueError, match="`num_groups` must be at least 1, got 0"):
        WorstGroupLoss(0)
    with pytest.raises(ValueError, match=r"must have shape \(2, 3\), got \(3, 3\)"):
        WorstGroupLoss(2, class_weight=torch.ones(3, 3))
