"""Focal loss over a softmax against plain numpy, at its limits, and without the bugs of public code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from losses.classification import FocalLoss, focal_loss

GENERATOR = torch.Generator().manual_seed(11)


def randn(*shape):
    return torch.randn(*shape, generator=GENERATOR)


def labels(high, *shape):
    return torch.randint(high, shape, generator=GENERATOR)


def reference(logits, target, gamma, table):
    """Probabilities first, one sample and position at a time; ``target`` holds probabilities."""
    losses = np.zeros((logits.shape[0], *logits.shape[2:]))
    for where in np.ndindex(*losses.shape):
        column = (where[0], slice(None), *where[1:])
        exponentials = np.exp(logits[column].astype(np.float64))
        p = exponentials / exponentials.sum()
        losses[where] = -np.sum(table[where[0]] * target[column] * (1 - p) ** gamma * np.log(p))
    return losses


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("positions", [(), (3,), (2, 3)])
def test_against_loops(gamma, positions):
    logits, target, table = randn(5, 4, *positions), labels(4, 5, *positions), torch.rand(2, 4)
    group = labels(2, 5)
    soft = F.one_hot(target, 4).movedim(-1, 1)
    expected = reference(logits.numpy(), soft.numpy(), gamma, table[group].numpy())
    given = focal_loss(logits, target, gamma=gamma, class_weight=table, group=group, reduction="none")
    np.testing.assert_allclose(given.numpy(), expected, rtol=1e-4, atol=1e-7)
    soft = randn(5, 4, *positions).softmax(1)
    expected = reference(logits.numpy(), soft.numpy(), gamma, table[group].numpy())
    given = focal_loss(logits, soft, gamma=gamma, class_weight=table, group=group)
    assert given.item() == pytest.approx(expected.mean(), rel=1e-4)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("positions", [(), (3,)])
def test_gamma_zero_is_cross_entropy(reduction, positions):
    logits, target = randn(6, 4, *positions), labels(4, 6, *positions)
    target[0] = -100
    expected = F.cross_entropy(logits, target, reduction=reduction)
    torch.testing.assert_close(FocalLoss(0.0, reduction=reduction)(logits, target), expected)
    soft = randn(6, 4, *positions).softmax(1)
    expected = F.cross_entropy(logits, soft, reduction=reduction)
    torch.testing.assert_close(focal_loss(logits, soft, gamma=0.0, reduction=reduction), expected)


def test_the_probability_is_that_of_the_unweighted_softmax():
    """LDAM-DRW takes p from the weighted cross entropy: p = .5 with a weight of 5 becomes .5 ** 5 = .031."""
    weighted = focal_loss(torch.zeros(1, 2), torch.tensor([0]), class_weight=torch.tensor([5.0, 1.0]))
    assert weighted.item() == pytest.approx(5 * 0.5**2 * np.log(2))
    wrong = (1 - 0.5**5) ** 2 * 5 * np.log(2)
    assert abs(weighted.item() - wrong) > 2


@pytest.mark.parametrize("gamma", [0.25, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("soft", [False, True])
def test_gradients_are_finite_where_the_probability_is_one(gamma, soft):
    logits = torch.tensor([[200.0, 0.0, 0.0], [0.0, 90.0, 0.0], [16.0, 0.0, 0.0]], requires_grad=True)
    target = torch.tensor([0, 1, 0])
    loss = focal_loss(logits, F.one_hot(target, 3).float() if soft else target, gamma=gamma)
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    (second,) = torch.autograd.grad(gradient.square().sum(), logits)
    assert second.isfinite().all()


def test_the_missing_probability_keeps_its_digits():
    logits, target = torch.stack([torch.linspace(5, 9, 20), torch.zeros(20)], dim=1), torch.zeros(20, dtype=torch.long)
    plain = F.cross_entropy(logits, target, reduction="none").double()
    expected = -torch.expm1(-plain) * plain  # 1 - exp(-plain) in float32 is off by 1e-5 and more
    given = focal_loss(logits, target, gamma=1.0, reduction="none").double()
    torch.testing.assert_close(given, expected, rtol=1e-6, atol=0)


def test_hard_samples_dominate():
    logits = torch.tensor([[4.0, 0.0], [0.0, 1.0]])
    plain = F.cross_entropy(logits, torch.tensor([0, 0]), reduction="none")
    focal = focal_loss(logits, torch.tensor([0, 0]), reduction="none")
    assert focal[0] / focal[1] < 1e-2 * plain[0] / plain[1]


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_gradcheck(gamma):
    logits, target, table = randn(4, 3, 2).double().requires_grad_(), labels(3, 4, 2), torch.rand(3).double()
    target[0, 0] = -100
    soft = randn(4, 3, 2).double().softmax(1)
    assert torch.autograd.gradcheck(lambda z: focal_loss(z, target, gamma=gamma, class_weight=table), (logits,))
    assert torch.autograd.gradcheck(lambda z: focal_loss(z, soft, gamma=gamma, class_weight=table), (logits,))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 5), st.integers(2, 5), st.integers(0, 3), st.data())
def test_ignored_samples_change_nothing(samples, classes, padding, data):
    logits = torch.tensor(
        data.draw(
            st.lists(
                st.lists(st.floats(-9, 9), min_size=classes, max_size=classes),
                min_size=samples + padding,
                max_size=samples + padding,
            )
        )
    )
    target = torch.tensor(data.draw(st.lists(st.integers(0, classes - 1), min_size=samples, max_size=samples)))
    padded = torch.cat([target, torch.full((padding,), -100)])
    given = focal_loss(logits, padded)
    torch.testing.assert_close(given, focal_loss(logits[:samples], target))
    rows = focal_loss(logits, padded, reduction="none")
    assert rows.shape == (samples + padding,)
    assert rows[samples:].eq(0).all()


def test_weights_are_set_in_place():
    criterion, logits, target = FocalLoss(class_weight=torch.ones(3)), randn(4, 3), labels(3, 4)
    plain = criterion(logits, target)
    criterion.set_class_weight([2.0, 2.0, 2.0])
    torch.testing.assert_close(criterion(logits, target), 2 * plain)
    grouped = FocalLoss(class_weight=[1.0, 3.0], num_groups=2)
    assert grouped.class_weight.tolist() == [[1.0, 3.0], [1.0, 3.0]]


def test_without_weights_there_is_no_state():
    criterion = FocalLoss()
    assert not criterion.state_dict()
    with pytest.raises(RuntimeError, match="FocalLoss was built without class weights: pass them when building it"):
        criterion.set_class_weight([1.0, 2.0])


def test_repr_builds_it_again():
    assert repr(FocalLoss(1.5)) == "FocalLoss(gamma=1.5, reduction='mean', ignore_index=-100)"
    assert "gamma=2.0, num_groups=2" in repr(FocalLoss(class_weight=[1.0, 1.0], num_groups=2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma": -1.0}, r"`gamma` must be a finite number, at least 0, got -1.0"),
        ({"gamma": float("nan")}, r"`gamma` must be a finite number, at least 0, got nan"),
        ({"class_weight": 1.0}, r"`class_weight` must have shape \(classes,\) or \(groups, classes\), got \(\)"),
        ({"class_weight": [1.0, -1.0]}, r"`weight` must be finite and not negative, got -1.0"),
        ({"reduction": "average"}, r"`reduction` must be one of"),
    ],
)
def test_construction_checks(arguments, message):
    with pytest.raises(ValueError, match=message):
        FocalLoss(**arguments)


def test_call_checks():
    with pytest.raises(ValueError, match=r"`gamma` must be a finite number, at least 0, got -0.5"):
        focal_loss(torch.zeros(1, 2), torch.tensor([0]), gamma=-0.5)
    with pytest.raises(ValueError, match=r"`target` must lie between 0 and 1, got 2"):
        focal_loss(torch.zeros(1, 2), torch.tensor([2]))
