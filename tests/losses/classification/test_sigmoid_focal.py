"""Focal loss of one question per label against the formula in numpy, with missing labels and at its limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from losses.classification import SigmoidFocalLoss, sigmoid_focal_loss

GENERATOR = torch.Generator().manual_seed(13)


def randn(*shape):
    return torch.randn(*shape, generator=GENERATOR)


def labels(*shape):
    return torch.randint(2, shape, generator=GENERATOR)


def reference(logits, target, gamma, alpha):
    """The alpha-balanced form of the paper, from probabilities, in float64."""
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    t = target.astype(np.float64)
    p_t = p * t + (1 - p) * (1 - t)
    alpha_t = 1.0 if alpha is None else alpha * t + (1 - alpha) * (1 - t)
    return -alpha_t * (1 - p_t) ** gamma * (t * np.log(p) + (1 - t) * np.log(1 - p))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("alpha", [None, 0.25, 0.0, 1.0])
@pytest.mark.parametrize("shape", [(6,), (6, 3), (6, 3, 2)])
def test_against_the_formula(gamma, alpha, shape):
    logits = randn(*shape)
    for target in (labels(*shape), labels(*shape).bool(), torch.rand(shape)):
        expected = reference(logits.numpy(), target.numpy(), gamma, alpha)
        given = sigmoid_focal_loss(logits, target, gamma=gamma, alpha=alpha, reduction="none")
        np.testing.assert_allclose(given.numpy(), expected, rtol=1e-4, atol=1e-7)
        mean = SigmoidFocalLoss(gamma, alpha)(logits, target)
        assert mean.item() == pytest.approx(expected.mean(), rel=1e-4)
        total = SigmoidFocalLoss(gamma, alpha, reduction="sum")(logits, target)
        assert total.item() == pytest.approx(expected.sum(), rel=1e-4)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_without_focus_and_balance_it_is_binary_cross_entropy(reduction):
    logits, target = randn(5, 3), torch.rand(5, 3)
    expected = F.binary_cross_entropy_with_logits(logits, target, reduction=reduction)
    given = sigmoid_focal_loss(logits, target, gamma=0, alpha=None, reduction=reduction)
    torch.testing.assert_close(given, expected)


def test_missing_labels_neither_cost_nor_count():
    logits, target = randn(4, 3).requires_grad_(), labels(4, 3)
    target[0, 1] = target[2] = -100
    known = target != -100
    loss = sigmoid_focal_loss(logits, target)
    loss.backward()
    torch.testing.assert_close(loss, sigmoid_focal_loss(logits[known], target[known]))
    assert logits.grad[~known].eq(0).all()
    assert logits.grad[known].ne(0).all()
    rows = sigmoid_focal_loss(logits, target.float(), reduction="none")
    assert rows[~known].eq(0).all()


@pytest.mark.parametrize("gamma", [0.0, 2.0])
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_logits_of_missing_labels_are_not_looked_at(bad, gamma):
    logits, target = randn(4, 3), labels(4, 3)
    logits[1, 2], target[1, 2] = bad, -100
    logits.requires_grad_()
    loss = sigmoid_focal_loss(logits, target, gamma=gamma)
    loss.backward()
    known = target != -100
    torch.testing.assert_close(loss, sigmoid_focal_loss(logits[known], target[known], gamma=gamma))
    assert logits.grad.isfinite().all()
    assert logits.grad[1, 2] == 0


def test_a_row_of_logits_is_one_label_each():
    logits, target = randn(5), labels(5)
    column = sigmoid_focal_loss(logits[:, None], target[:, None], class_weight=torch.tensor([3.0]))
    torch.testing.assert_close(sigmoid_focal_loss(logits, target, class_weight=torch.tensor([3.0])), column)


@pytest.mark.parametrize("positions", [(), (2,)])
def test_weights_of_class_group_and_sample(positions):
    logits, target = randn(4, 3, *positions), labels(4, 3, *positions)
    table, group, weight = torch.rand(2, 3), torch.tensor([0, 1, 1, 0]), torch.rand(4)
    plain = sigmoid_focal_loss(logits, target, reduction="none")
    axes = (4, 1, *[1] * len(positions))
    expected = plain * table[group].reshape(4, 3, *axes[2:]) * weight.reshape(axes)
    arguments = {"class_weight": table, "group": group, "reduction": "none"}
    given = sigmoid_focal_loss(logits, target, sample_weight=weight, **arguments)
    torch.testing.assert_close(given, expected)
    given = sigmoid_focal_loss(logits, target, sample_weight=weight.reshape(axes).expand_as(logits), **arguments)
    torch.testing.assert_close(given, expected)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_extreme_logits_are_finite_and_exact(gamma):
    logits = torch.tensor([[-300.0, 300.0, -60.0, 60.0, 15.0]], requires_grad=True)
    right = torch.tensor([[0.0, 1.0, 0.0, 1.0, 1.0]])
    for target in (right, 1 - right, torch.full_like(right, 0.5)):
        loss = sigmoid_focal_loss(logits, target, gamma=gamma, reduction="none")
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert loss.isfinite().all()
        assert gradient.isfinite().all()
    wrong = sigmoid_focal_loss(logits, 1 - right, gamma=gamma, alpha=None, reduction="none")
    torch.testing.assert_close(wrong, logits.abs())  # 1 - p_t is one: the loss is linear
    miss = sigmoid_focal_loss(logits, right, gamma=gamma, alpha=None, reduction="none")[0, 4].item()
    exact = 1 / (1 + np.exp(15.0))
    assert miss == pytest.approx(exact**gamma * np.log1p(np.exp(-15.0)), rel=1e-5)


def test_gradcheck():
    logits, target = randn(4, 3).double().requires_grad_(), torch.rand(4, 3).double()
    target[0, 0], target[1] = -100, torch.tensor([0.0, 1.0, 0.0])
    assert torch.autograd.gradcheck(lambda z: sigmoid_focal_loss(z, target), (logits,))
    assert torch.autograd.gradcheck(lambda z: sigmoid_focal_loss(z, target, gamma=0.5, alpha=None), (logits,))


def test_repr_builds_it_again():
    expected = "SigmoidFocalLoss(gamma=2.0, alpha=None, reduction='mean', ignore_index=-100)"
    assert repr(SigmoidFocalLoss(alpha=None)) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": torch.tensor([[0, 2]])}, r"`target` must lie between 0 and 1, got 2"),
        ({"target": torch.tensor([[0.0, torch.nan]])}, r"`target` must lie between 0 and 1, got nan"),
        ({"target": torch.tensor([0])}, r"`target` must have shape of `logits` = \(1, 2\), got \(1,\)"),
        ({"logits": torch.tensor(0.0)}, r"`logits` must be a tensor of shape \(samples,\) or"),
        ({"gamma": -1}, r"`gamma` must be a finite number, at least 0, got -1"),
        ({"alpha": 1.5}, r"`alpha` must be a finite number, between 0 and 1, got 1.5"),
        ({"class_weight": torch.ones(3)}, r"`class_weight` must have shape \(classes,\) = \(2,\), got \(3,\)"),
        ({"class_weight": torch.ones(3, 2)}, r"one row for each of 3 groups, but `group` is missing"),
        ({"sample_weight": torch.ones(2)}, r"`sample_weight` must have shape \(samples,\) = \(1,\), got \(2,\)"),
        ({"reduction": "max"}, r"`reduction` must be one of"),
    ],
)
def test_call_checks(arguments, message):
    arguments = {"logits": torch.zeros(1, 2), "target": torch.tensor([[0, 1]]), **arguments}
    with pytest.raises(ValueError, match=message):
        sigmoid_focal_loss(arguments.pop("logits"), arguments.pop("target"), **arguments)


def test_construction_checks():
    with pytest.raises(ValueError, match=r"`alpha` must be a finite number, between 0 and 1, got -1"):
        SigmoidFocalLoss(alpha=-1)  # what other libraries write for no balance
