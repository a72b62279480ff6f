"""Negative correlation against plain numpy loops, what its gradient is, and what the reward does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from losses import weighted_cross_entropy
from losses.ensemble import NegativeCorrelationLoss, negative_correlation_loss

GENERATOR = torch.Generator().manual_seed(11)


def randn(*shape):
    return torch.randn(*shape, generator=GENERATOR)


def labels(high, *shape):
    return torch.randint(high, shape, generator=GENERATOR)


def reference(logits, target, strength, table=None, sample_weight=None, ignore_index=-100):
    """One sample, one position, one member at a time: the losses that count."""
    losses = []
    for n in range(logits.shape[1]):
        for position in np.ndindex(*logits.shape[3:]):
            label = int(target[(n, *position)])
            if label == ignore_index:
                continue
            members = []
            for member in range(logits.shape[0]):
                scores = np.exp(logits[(member, n, slice(None), *position)].astype(np.float64))
                members.append(scores / scores.sum())
            mean = np.mean(members, axis=0)
            loss = np.mean([-np.log(p[label]) - strength * np.sum((p - mean) ** 2) for p in members])
            loss *= 1.0 if table is None else table[n][label]
            losses.append(loss * (1.0 if sample_weight is None else sample_weight[n]))
    return losses


@pytest.mark.parametrize("positions", [(), (3,), (2, 2)])
@pytest.mark.parametrize("strength", [0.0, 0.5, 2.0])
def test_against_loops(positions, strength):
    logits, target = randn(3, 6, 4, *positions) * 2, labels(4, 6, *positions)
    target[1] = -100
    table, group, sample_weight = torch.rand(2, 4), labels(2, 6), torch.rand(6)
    arguments = {"class_weight": table, "group": group, "sample_weight": sample_weight, "strength": strength}
    expected = reference(logits.numpy(), target.numpy(), strength, table[group].numpy(), sample_weight.numpy())
    assert negative_correlation_loss(logits, target, **arguments).item() == pytest.approx(np.mean(expected), rel=1e-5)
    total = negative_correlation_loss(logits, target, reduction="sum", **arguments)
    assert total.item() == pytest.approx(np.sum(expected), rel=1e-5)
    each = negative_correlation_loss(logits, target, reduction="none", **arguments)
    assert each.shape == target.shape
    np.testing.assert_allclose(each[target != -100].numpy(), expected, rtol=1e-4, atol=1e-6)
    assert each[1].eq(0).all()


def test_strength_zero_is_the_mean_of_cross_entropies():
    logits, target = randn(4, 6, 3), labels(3, 6)
    expected = torch.stack([F.cross_entropy(member, target) for member in logits]).mean()
    torch.testing.assert_close(negative_correlation_loss(logits, target, strength=0.0), expected)


@pytest.mark.parametrize("members", [1, 3])
def test_equal_members_earn_no_reward(members):
    logits, target = randn(1, 6, 3).expand(members, -1, -1), labels(3, 6)
    expected = F.cross_entropy(logits[0], target)
    torch.testing.assert_close(negative_correlation_loss(logits, target, strength=5.0), expected)


def test_the_reward_is_the_ambiguity_of_the_squared_error():
    logits, target = randn(4, 6, 3), labels(3, 6)
    probabilities, truth = logits.softmax(dim=2), F.one_hot(target, 3)
    mean_error = (probabilities - truth).square().sum(dim=2).mean()
    error_of_mean = (probabilities.mean(dim=0) - truth).square().sum(dim=1).mean()
    with_reward, without = (negative_correlation_loss(logits, target, strength=s) for s in (1.0, 0.0))
    torch.testing.assert_close(without - with_reward, mean_error - error_of_mean)


def test_the_gradient_is_that_with_the_mean_held_constant():
    logits, target = randn(4, 6, 3).double().requires_grad_(), labels(3, 6)
    given_ = torch.autograd.grad(negative_correlation_loss(logits, target, strength=0.7), logits)[0]
    probabilities = logits.softmax(dim=2)
    held = probabilities.mean(dim=0).detach()
    entropy = torch.stack([F.cross_entropy(member, target) for member in logits]).mean()
    loss = entropy - 0.7 * (probabilities - held).square().sum(dim=2).mean()
    torch.testing.assert_close(given_, torch.autograd.grad(loss, logits)[0])


def test_half_the_papers_strength_gives_the_papers_gradient():
    probabilities = randn(4, 3).double().requires_grad_()  # outputs F_i of four members
    strength = 0.3
    deviation = probabilities - probabilities.mean(dim=0)
    (-strength * deviation.square().sum()).backward()
    others = deviation.sum(dim=0) - deviation  # sum over j != i of F_j - F
    torch.testing.assert_close(probabilities.grad, (2 * strength * others).detach())


def test_a_weight_of_two_is_a_sample_drawn_twice():
    logits, target = randn(3, 4, 3), torch.tensor([0, 1, 2, 2])
    twice = torch.cat([logits, logits[:, 1:2]], dim=1)
    expected = negative_correlation_loss(twice, torch.cat([target, target[1:2]]), reduction="sum")
    by_sample = torch.tensor([1.0, 2.0, 1.0, 1.0])
    by_class = torch.tensor([1.0, 2.0, 1.0])
    for arguments in ({"sample_weight": by_sample}, {"class_weight": by_class}):
        torch.testing.assert_close(negative_correlation_loss(logits, target, reduction="sum", **arguments), expected)


def test_soft_targets_equal_hard_ones():
    logits, target, weight = randn(3, 6, 4, 2), labels(4, 6, 2), torch.rand(4)
    soft = F.one_hot(target, 4).movedim(-1, 1).float()
    hard = negative_correlation_loss(logits, target, class_weight=weight)
    torch.testing.assert_close(negative_correlation_loss(logits, soft, class_weight=weight), hard)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    members=st.integers(1, 4),
    samples=st.integers(1, 4),
    classes=st.integers(1, 4),
    strength=st.floats(0, 3),
    seed=st.integers(0, 99),
)
def test_the_reward_is_bounded(members, samples, classes, strength, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(members, samples, classes, generator=generator)
    target = torch.randint(classes, (samples,), generator=generator)
    loss = negative_correlation_loss(logits, target, strength=strength, reduction="none")
    entropy = torch.stack([weighted_cross_entropy(member, target, reduction="none") for member in logits]).mean(dim=0)
    assert (loss <= entropy + 1e-5).all()
    assert (loss >= entropy - strength * (1 - 1 / members) - 1e-5).all()


def test_a_list_of_members_is_a_stack():
    logits, target = randn(3, 5, 4), labels(4, 5)
    torch.testing.assert_close(
        negative_correlation_loss(list(logits), target), negative_correlation_loss(logits, target)
    )


def test_descent_makes_members_differ():
    target = labels(3, 30)
    spreads = []
    for strength in (0.0, 0.9):
        logits = (0.1 * torch.randn(3, 30, 3, generator=torch.Generator().manual_seed(5))).requires_grad_()
        optimizer = torch.optim.SGD([logits], lr=5.0)
        for _ in range(50):
            optimizer.zero_grad()
            negative_correlation_loss(logits, target, strength=strength).backward()
            optimizer.step()
        probabilities = logits.detach().softmax(dim=2)
        spreads.append((probabilities - probabilities.mean(dim=0)).square().sum(dim=2).mean().item())
    assert spreads[1] > 1.5 * spreads[0]


def test_gradcheck():
    logits, target, table = randn(3, 4, 3).double().requires_grad_(), labels(3, 4), torch.rand(3).double()
    target[0] = -100
    assert torch.autograd.gradcheck(lambda z: negative_correlation_loss(z, target, class_weight=table), (logits,))


def test_module_is_the_function():
    logits, target = randn(3, 5, 4), labels(4, 5)
    module = NegativeCorrelationLoss(0.2, class_weight=[1.0, 2.0, 3.0, 4.0], reduction="none", ignore_index=1)
    expected = negative_correlation_loss(
        logits, target, strength=0.2, class_weight=torch.arange(1.0, 5.0), reduction="none", ignore_index=1
    )
    torch.testing.assert_close(module(logits, target), expected)
    assert repr(module) == "NegativeCorrelationLoss(strength=0.2, reduction='none', ignore_index=1)"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"logits": []}, ValueError, "`logits` must hold the logits of at least one member"),
        ({"logits": torch.zeros(5, 4)}, ValueError, r"at least one member, .*, got shape \(5, 4\). Stack"),
        ({"logits": [torch.zeros(5, 4), None]}, TypeError, r"`logits\[1\]` must be a tensor"),
        (
            {"logits": [torch.zeros(5, 4), torch.zeros(5, 3)]},
            ValueError,
            r"`logits\[1\]` must have shape of `logits\[0\]`",
        ),
        ({"strength": -0.1}, ValueError, "`strength` must be a finite number, at least 0, got -0.1"),
        ({"strength": "0.5"}, TypeError, "`strength` must be a number, got '0.5'"),
        ({"target": torch.full((5,), 4)}, ValueError, "`target` must lie between 0 and 3, got 4"),
    ],
)
def test_checks(arguments, error, message):
    with pytest.raises(error, match=message):
        negative_correlation_loss(**{"logits": torch.zeros(3, 5, 4), "target": torch.zeros(5).long(), **arguments})


def test_module_checks_at_construction():
    with pytest.raises(ValueError, match="`strength` must be a finite number, at least 0, got -1"):
        NegativeCorrelationLoss(-1)
