"""Effective-number weights against the formula, empty classes, and the loss that uses them."""

from __future__ import annotations

from decimal import Decimal, getcontext
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from losses.classification import ClassBalancedLoss, class_balanced_loss, effective_number_weights

GENERATOR = torch.Generator().manual_seed(17)


def randn(*shape):
    return torch.randn(*shape, generator=GENERATOR)


def labels(high, *shape):
    return torch.randint(high, shape, generator=GENERATOR)


def reference(counts, beta):
    """The paper's weights with 60 digits."""
    getcontext().prec = 60
    beta = Decimal(beta)
    weights = [(1 - beta) / (1 - beta**count) for count in counts]
    return [float(len(counts) * weight / sum(weights)) for weight in weights]


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.99, 0.9999, 0.9999999, 1 - 1e-12])
def test_weights_are_those_of_the_paper(beta):
    counts = [1, 2, 5, 80, 5000, 10**6, 10**9]
    given = effective_number_weights(counts, beta)
    np.testing.assert_allclose(given.numpy(), reference(counts, beta), rtol=2e-6)
    assert given.sum().item() == pytest.approx(len(counts), rel=1e-6)


def test_beta_zero_weighs_alike_and_beta_one_by_inverse_frequency():
    assert effective_number_weights([5000, 3, 70], 0.0).tolist() == [1.0, 1.0, 1.0]
    inverse = torch.tensor([1 / 5000, 1 / 3, 1 / 70])
    torch.testing.assert_close(effective_number_weights([5000, 3, 70], 1.0), 3 * inverse / inverse.sum())
    near = effective_number_weights([5000, 3, 70], 1 - 1e-15)
    torch.testing.assert_close(near, effective_number_weights([5000, 3, 70], 1.0))


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.9999, 1.0])
def test_an_empty_class_divides_nothing_by_zero(beta):
    """In public code a class without samples has an infinite weight, and after the rescaling all others are zero."""
    weights = effective_number_weights([90, 0, 9, 0], beta)
    others = effective_number_weights([90, 9], beta)
    assert weights[[1, 3]].tolist() == [1.0, 1.0]
    torch.testing.assert_close(weights[[0, 2]], others)
    assert weights.sum().item() == pytest.approx(4)
    loss = ClassBalancedLoss([90, 0, 9, 0], beta, label_smoothing=0.1)(randn(5, 4), labels(4, 5))
    assert loss.isfinite()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 10**7), min_size=1, max_size=6).filter(any), st.floats(0, 1))
def test_rarer_classes_never_weigh_less(counts, beta):
    weights = effective_number_weights(counts, beta)
    assert weights.isfinite().all()
    assert weights.gt(0).all()
    assert weights.sum().item() == pytest.approx(len(counts), rel=1e-4)
    filled = sorted((count, weight) for count, weight in zip(counts, weights.tolist(), strict=True) if count)
    assert all(rare[1] >= frequent[1] * (1 - 1e-6) for rare, frequent in pairwise(filled))


@pytest.mark.parametrize("positions", [(), (3,)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_is_cross_entropy_times_the_weight(positions, reduction):
    logits, target = randn(6, 3, *positions), labels(3, 6, *positions)
    target[0] = -100
    weights = torch.tensor(reference([500, 20, 3], 0.99), dtype=torch.float32)
    expected = F.cross_entropy(logits, target, weight=weights, reduction="none")
    counted = (target != -100).sum()
    expected = {"none": expected, "sum": expected.sum(), "mean": expected.sum() / counted}[reduction]
    arguments = {"class_counts": [500, 20, 3], "beta": 0.99}
    torch.testing.assert_close(class_balanced_loss(logits, target, reduction=reduction, **arguments), expected)
    torch.testing.assert_close(ClassBalancedLoss(**arguments, reduction=reduction)(logits, target), expected)


def test_beta_zero_is_cross_entropy():
    logits, target, soft = randn(6, 4), labels(4, 6), randn(6, 4).softmax(1)
    criterion = ClassBalancedLoss([9, 0, 500, 1], beta=0.0, label_smoothing=0.1)
    torch.testing.assert_close(criterion(logits, target), F.cross_entropy(logits, target, label_smoothing=0.1))
    torch.testing.assert_close(criterion(logits, soft), F.cross_entropy(logits, soft, label_smoothing=0.1))


def test_further_weights_multiply():
    logits, target, table, group = randn(6, 3), labels(3, 6), torch.rand(2, 3), labels(2, 6)
    weights = effective_number_weights([50, 5, 1], 0.9)
    plain = F.cross_entropy(logits, target, reduction="none")
    given = class_balanced_loss(
        logits, target, class_counts=[50, 5, 1], beta=0.9, class_weight=table, group=group, reduction="none"
    )
    torch.testing.assert_close(given, plain * weights[target] * table[group, target])


def test_a_batch_of_one_keeps_its_weight():
    criterion, logits = ClassBalancedLoss([99, 1], beta=1.0), torch.zeros(1, 2)
    rare, frequent = (criterion(logits, torch.tensor([label])) for label in (1, 0))
    assert (rare / frequent).item() == pytest.approx(99)


def test_gradcheck():
    logits, target = randn(4, 3).double().requires_grad_(), labels(3, 4)
    assert torch.autograd.gradcheck(lambda z: class_balanced_loss(z, target, class_counts=[9, 3, 0]), (logits,))


def test_weights_can_be_set_and_are_state():
    criterion, other = ClassBalancedLoss([90, 10]), ClassBalancedLoss([50, 50])
    assert other.class_weight.tolist() == [1.0, 1.0]
    criterion.set_class_weight([4.0, 5.0])
    other.load_state_dict(criterion.state_dict())
    assert other.class_weight.tolist() == [4.0, 5.0]


def test_repr_builds_it_again():
    criterion = ClassBalancedLoss([900, 2.5], 0.99)
    expected = "ClassBalancedLoss([900, 2.5], beta=0.99, label_smoothing=0.0, reduction='mean', ignore_index=-100)"
    assert repr(criterion) == expected
    assert "([1000000, 2, 3, 4, 5, 6, 7, ...], beta" in repr(ClassBalancedLoss([10**6, 2, 3, 4, 5, 6, 7, 8, 9]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_counts": [1, 2], "beta": 1.5}, r"`beta` must be a finite number, between 0 and 1, got 1.5"),
        ({"class_counts": [1, -2]}, r"`class_counts` must be finite and not negative, got -2"),
        ({"class_counts": [1, float("nan")]}, r"`class_counts` must be finite and not negative, got nan"),
        ({"class_counts": [0, 0]}, r"`class_counts` must have a class with samples, got zeros only"),
        ({"class_counts": [[1, 2]]}, r"`class_counts` must have shape \(classes,\), got \(1, 2\)"),
        ({"class_counts": [1, 2], "label_smoothing": 2}, r"`label_smoothing` must be a finite number, between 0 and 1"),
    ],
)
def test_construction_checks(arguments, message):
    with pytest.raises(ValueError, match=message):
        ClassBalancedLoss(**arguments)


def test_counts_must_fit_the_logits():
    with pytest.raises(ValueError, match=r"`class_weight` must have shape \(classes,\) = \(3,\), got \(2,\)"):
        ClassBalancedLoss([5, 5])(torch.zeros(1, 3), torch.tensor([0]))
