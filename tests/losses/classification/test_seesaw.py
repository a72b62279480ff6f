"""Seesaw loss against the paper's factors in plain numpy, and the counts that it keeps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from losses.classification import SeesawLoss, seesaw_loss

GENERATOR = torch.Generator().manual_seed(29)


def randn(*shape):
    return torch.randn(*shape, generator=GENERATOR)


def labels(high, *shape):
    return torch.randint(high, shape, generator=GENERATOR)


def reference(logits, target, counts, p, q, eps=0.01):
    """Every factor of every pair of classes, one at a time, in float64."""
    counts = np.maximum(np.array(counts, dtype=np.float64), 1)
    losses = np.zeros(target.shape)
    for where in np.ndindex(*target.shape):
        i = target[where]
        if i == -100:
            continue
        exponentials = np.exp(logits[(where[0], slice(None), *where[1:])].astype(np.float64))
        sigma = exponentials / exponentials.sum()
        total = exponentials[i]
        for j in range(len(counts)):
            if j != i:
                mitigation = (counts[j] / counts[i]) ** p if counts[i] > counts[j] else 1.0
                ratio = sigma[j] / max(sigma[i], eps)
                compensation = ratio**q if ratio > 1 else 1.0
                total += mitigation * compensation * exponentials[j]
        losses[where] = -np.log(exponentials[i] / total)
    return losses


@pytest.mark.parametrize(("p", "q"), [(0.8, 2.0), (0.8, 0.0), (0.0, 2.0), (1.5, 0.5)])
@pytest.mark.parametrize("positions", [(), (3,), (2, 3)])
def test_against_loops(p, q, positions):
    logits, target = 3 * randn(6, 4, *positions), labels(4, 6, *positions)
    target[0] = -100
    counts = torch.tensor([900, 0, 25, 25])
    expected = reference(logits.numpy(), target.numpy(), counts.tolist(), p, q)
    given = seesaw_loss(logits, target, class_counts=counts, p=p, q=q, reduction="none")
    np.testing.assert_allclose(given.numpy(), expected, rtol=1e-4, atol=1e-6)
    mean = seesaw_loss(logits, target, class_counts=counts, p=p, q=q)
    assert mean.item() == pytest.approx(expected.sum() / (target != -100).sum().item(), rel=1e-4)


def test_counts_may_be_a_list():
    logits, target = randn(6, 3), labels(3, 6)
    expected = seesaw_loss(logits, target, class_counts=torch.tensor([9, 3, 0]))
    torch.testing.assert_close(seesaw_loss(logits, target, class_counts=[9, 3, 0]), expected)
    for bad in (-1.0, torch.nan):
        with pytest.raises(ValueError, match=rf"`class_counts` must be at least 0, got {bad}. Count the tr"):
            seesaw_loss(logits, target, class_counts=[9.0, bad, 0.0])


def test_the_targets_probability_is_bounded_in_the_compensation():
    logits, target, counts = torch.tensor([[-20.0, 5.0, 0.0]]), torch.tensor([0]), torch.ones(3)
    for eps in (0.01, 0.5):
        expected = reference(logits.numpy(), target.numpy(), counts.tolist(), 0.8, 2.0, eps).item()
        given = seesaw_loss(logits, target, class_counts=counts, eps=eps)
        assert given.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_without_strengths_it_is_cross_entropy(reduction):
    logits, target = randn(6, 4, 2), labels(4, 6, 2)
    target[0] = -100
    expected = F.cross_entropy(logits, target, reduction=reduction)
    torch.testing.assert_close(SeesawLoss(4, 0.0, 0.0, reduction=reduction)(logits, target), expected)


def test_equal_counts_and_right_answers_are_cross_entropy():
    logits, target = torch.eye(4) + 0.1 * randn(4, 4), torch.arange(4)
    given = seesaw_loss(logits, target, class_counts=torch.full((4,), 9))
    torch.testing.assert_close(given, F.cross_entropy(logits, target))


def test_weights_of_class_group_and_sample():
    logits, target, counts = randn(6, 3), labels(3, 6), torch.tensor([9, 3, 1])
    table, group, weight = torch.rand(2, 3), labels(2, 6), torch.rand(6)
    plain = seesaw_loss(logits, target, class_counts=counts, reduction="none")
    given = seesaw_loss(
        logits, target, class_counts=counts, class_weight=table, group=group, sample_weight=weight, reduction="none"
    )
    torch.testing.assert_close(given, plain * table[group, target] * weight)


def test_factors_have_no_gradient():
    logits, target, counts = 2 * randn(5, 3).double(), labels(3, 5), torch.tensor([50, 5, 1])
    logits.requires_grad_()
    seesaw_loss(logits, target, class_counts=counts).backward()
    sigma = logits.detach().softmax(1)
    own = sigma.gather(1, target[:, None])
    ratio = counts / counts[target][:, None]
    factors = torch.where(ratio < 1, ratio**0.8, 1.0) * (sigma / own.clamp(min=0.01)).clamp(min=1) ** 2
    weighted = factors.scatter(1, target[:, None], 1.0) * logits.detach().exp()
    expected = weighted / weighted.sum(1, keepdim=True) - F.one_hot(target, 3)
    torch.testing.assert_close(logits.grad, expected / 5)


def test_counts_are_added_in_training_only_and_before_the_loss():
    criterion, logits = SeesawLoss(4), randn(5, 4)
    target = torch.tensor([0, 0, 2, -100, 0])
    first = criterion(logits, target)
    assert criterion.class_counts.tolist() == [3, 0, 1, 0]
    criterion(randn(2, 4, 3), torch.tensor([[3, 3, -100], [3, 0, 0]]))
    assert criterion.class_counts.tolist() == [5, 0, 1, 3]
    criterion.eval()
    before = criterion(logits, target)
    assert criterion.class_counts.tolist() == [5, 0, 1, 3]
    torch.testing.assert_close(first, seesaw_loss(logits, target, class_counts=torch.tensor([3, 0, 1, 0])))
    torch.testing.assert_close(before, seesaw_loss(logits, target, class_counts=torch.tensor([5, 0, 1, 3])))


def test_counts_are_state():
    """A checkpoint without the cumulative counts would begin again with no mitigation."""
    criterion, other = SeesawLoss(3), SeesawLoss(3)
    criterion(randn(4, 3), torch.tensor([0, 0, 0, 1]))
    other.load_state_dict(criterion.state_dict())
    assert other.class_counts.tolist() == [3, 1, 0]
    assert criterion.half().class_counts.dtype == torch.int64  # float16 would stop to count at 2048


def test_a_loss_that_is_called_twice_before_backward():
    criterion, logits = SeesawLoss(3), randn(4, 3).requires_grad_()
    loss = criterion(logits, labels(3, 4)) + criterion(logits, labels(3, 4))
    loss.backward()
    assert logits.grad.isfinite().all()
    assert criterion.class_counts.sum() == 8


def test_targets_of_all_processes_are_counted(monkeypatch):
    group = object()
    calls = []

    def three_alike(tensor, process_group):
        calls.append(process_group)
        return 3 * tensor

    monkeypatch.setattr("losses.classification.seesaw.sum_over_processes", three_alike)
    criterion = SeesawLoss(2, process_group=group)
    criterion(randn(3, 2), torch.tensor([0, 0, 1]))
    assert criterion.class_counts.tolist() == [6, 3]
    criterion.eval()(randn(1, 2), torch.tensor([0]))
    assert calls == [group]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.integers(2, 5), st.lists(st.integers(0, 10**9), min_size=5, max_size=5), st.floats(0, 60), st.integers(0, 999)
)
def test_any_counts_and_logits_are_finite(classes, counts, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(4, classes, generator=generator)).requires_grad_()
    target = torch.randint(classes, (4,), generator=generator)
    loss = seesaw_loss(logits, target, class_counts=torch.tensor(counts[:classes]))
    loss.backward()
    assert loss.isfinite()
    assert loss >= 0
    assert logits.grad.isfinite().all()


def test_gradcheck():
    """With probabilities below those of the target, so that the factors that have no gradient are constant."""
    logits = (4 * torch.eye(3) + 0.1 * randn(3, 3)).double().requires_grad_()
    counts = torch.tensor([50, 5, 1])
    assert torch.autograd.gradcheck(lambda z: seesaw_loss(z, torch.arange(3), class_counts=counts), (logits,))


def test_class_probabilities_are_refused():
    with pytest.raises(TypeError, match=r"`target` must hold integer class indices, got torch.float32"):
        SeesawLoss(2)(torch.zeros(2, 2), torch.full((2, 2), 0.5))


def test_repr_builds_it_again():
    assert repr(SeesawLoss(5)) == "SeesawLoss(5, p=0.8, q=2.0, eps=0.01, reduction='mean', ignore_index=-100)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 0}, r"`num_classes` must be at least 1, got 0"),
        ({"p": -1.0}, r"`p` must be a finite number, at least 0, got -1.0"),
        ({"q": -1.0}, r"`q` must be a finite number, at least 0, got -1.0"),
        ({"eps": 0.0}, r"`eps` must be a finite number, above 0, up to 1, got 0.0"),
    ],
)
def test_construction_checks(arguments, message):
    with pytest.raises(ValueError, match=message):
        SeesawLoss(**{"num_classes": 2, **arguments})


def test_a_refused_batch_is_not_counted():
    criterion = SeesawLoss(2)
    for logits, target, message in (
        (torch.zeros(1, 3), torch.tensor([0]), r"`class_counts` must have shape \(classes,\) = \(3,\), got \(2,\)"),
        (torch.zeros(1, 2), torch.tensor([2]), r"`target` must lie between 0 and 1, got 2"),
        (torch.zeros(2), torch.tensor([0]), r"`logits` must be a tensor of shape"),
    ):
        with pytest.raises(ValueError, match=message):
            criterion(logits, target)
    assert criterion.class_counts.tolist() == [0, 0]


def test_mapped_over_logits_with_one_target():
    loss, target = SeesawLoss(3).eval(), torch.tensor([0, 1, 2, 0])
    logits = torch.randn(2, 4, 3)
    mapped = torch.func.vmap(torch.func.grad(loss), in_dims=(0, None))(logits, target)
    torch.testing.assert_close(mapped, torch.stack([torch.func.grad(loss)(each, target) for each in logits]))
