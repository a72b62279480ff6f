from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from losses.reliance.rationale_margin import RationaleMarginLoss, rationale_margin_loss


def score(logits, label):
    others = [value for index, value in enumerate(logits) if index != label]
    return logits[label] - np.log(np.sum(np.exp(others)))


def reference(logits, without, target, margin):
    return [max(0.0, margin - (score(x, y) - score(v, y))) for x, v, y in zip(logits, without, target, strict=True)]


def drawn(samples, classes):
    return torch.randn(samples, classes), torch.randn(samples, classes), torch.randint(classes, (samples,))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 5), st.integers(2, 5), st.floats(0, 4), st.integers(0, 2**30))
def test_against_loops(samples, classes, margin, seed):
    torch.manual_seed(seed)
    logits, without, target = drawn(samples, classes)
    present, weight = torch.rand(samples) < 0.7, torch.rand(samples)
    each = np.array(reference(logits.double().numpy(), without.double().numpy(), target.numpy(), margin))
    expected = each * present.numpy() * weight.numpy()
    arguments = {"margin": margin, "present": present, "sample_weight": weight}
    given_each = rationale_margin_loss(logits, without, target, reduction="none", **arguments)
    np.testing.assert_allclose(given_each.numpy(), expected, rtol=1e-4, atol=1e-5)
    total = rationale_margin_loss(logits, without, target, reduction="sum", **arguments)
    assert total.item() == pytest.approx(expected.sum(), rel=1e-4, abs=1e-5)
    mean = rationale_margin_loss(logits, without, target, **arguments)
    assert mean.item() == pytest.approx(expected.sum() / max(1, int(present.sum())), rel=1e-4, abs=1e-5)


def test_with_two_classes_it_is_the_contrast_constraint_of_the_paper():
    """There: y (w·x - w·v) at least mu, for a label y of plus or minus one and a linear score."""
    weight, x, v, sign = torch.randn(4), torch.randn(6, 4), torch.randn(6, 4), torch.randn(6).sign()
    expected = (1.5 - sign * (x @ weight - v @ weight)).clamp_min(0)
    logits, without = (torch.stack([torch.zeros(6), data @ weight], dim=1) for data in (x, v))
    each = rationale_margin_loss(logits, without, (sign > 0).long(), margin=1.5, reduction="none")
    torch.testing.assert_close(each, expected)


def test_shifting_all_logits_buys_nothing():
    logits, without, target = drawn(5, 3)
    expected = rationale_margin_loss(logits, without, target)
    torch.testing.assert_close(rationale_margin_loss(logits + 7, without - 3, target), expected)


def test_no_rationale_no_difference():
    logits, _, target = drawn(5, 3)
    torch.testing.assert_close(rationale_margin_loss(logits, logits, target, margin=0.5), torch.tensor(0.5))
    assert rationale_margin_loss(logits, logits, target, margin=0.0) == 0.0


def test_samples_without_a_rationale_may_hold_anything():
    logits, without, target = drawn(3, 3)
    logits[1], without[1] = float("nan"), float("-inf")
    logits.requires_grad_()
    without.requires_grad_()
    target[1] = -100
    loss = rationale_margin_loss(logits, without, target, margin=5.0)
    loss.backward()
    rest = torch.tensor([0, 2])
    torch.testing.assert_close(loss, rationale_margin_loss(logits[rest], without[rest], target[rest], margin=5.0))
    for part in (logits, without):
        assert part.grad[1].eq(0).all()
        assert part.grad[rest].isfinite().all()
    target[1] = 2
    present = torch.tensor([1, 0, 1])
    torch.testing.assert_close(rationale_margin_loss(logits, without, target, margin=5.0, present=present), loss)


def test_gradcheck():
    logits, without, target = drawn(4, 3)
    pair = (logits.double().requires_grad_(), without.double().requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: rationale_margin_loss(a, b, target, margin=3.0), pair)


def test_half_precision_does_not_overflow():
    logits = torch.tensor([[6e4, -6e4]], dtype=torch.float16, requires_grad=True)
    loss = rationale_margin_loss(logits, -logits, torch.tensor([1]))
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.tensor(4 * 6e4 + 1), rtol=1e-3, atol=0)
    assert logits.grad.isfinite().all()


def test_it_makes_a_model_need_the_rationale():
    model = nn.EmbeddingBag(6, 2, mode="sum")
    tokens, rationale = torch.tensor([[1, 2, 3], [4, 2, 5]]), torch.tensor([[1, 0, 0], [1, 0, 0]]).bool()
    target, criterion = torch.tensor([0, 1]), RationaleMarginLoss(2.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(20):
        loss = criterion(model(tokens), model(tokens.masked_fill(rationale, 0)), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss == 0.0
    gap = model(tokens) - model(tokens.masked_fill(rationale, 0))
    assert (gap[0, 0] - gap[0, 1] > 1.9) & (gap[1, 1] - gap[1, 0] > 1.9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 1)}, r"with at least two classes, got \(2, 1\). Give a binary model with one logit"),
        ({"logits": torch.zeros(2)}, r"`logits` must have shape \(samples, classes\)"),
        (
            {"logits_without": torch.zeros(3, 2)},
            r"`logits_without` must have shape of `logits` = \(2, 2\), got \(3, 2\)",
        ),
        ({"target": torch.tensor([0, 2])}, r"`target` must lie between 0 and 1, got 2"),
        ({"present": torch.ones(3)}, r"`present` must have shape \(samples,\) = \(2,\), got \(3,\)"),
        ({"sample_weight": torch.ones(3)}, r"`sample_weight` must have shape"),
        ({"margin": -1.0}, r"`margin` must be a finite number, at least 0, got -1.0"),
        ({"reduction": "max"}, r"`reduction` must be one of"),
    ],
)
def test_call_checks(change, message):
    arguments = {"logits": torch.zeros(2, 2), "logits_without": torch.zeros(2, 2), "target": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match=message):
        rationale_margin_loss(**{**arguments, **change})


def test_construction_checks_and_repr():
    with pytest.raises(ValueError, match="`margin` must be a finite number, at least 0, got nan"):
        RationaleMarginLoss(float("nan"))
    with pytest.raises(ValueError, match="`reduction` must be one of"):
        RationaleMarginLoss(reduction="max")
    assert repr(RationaleMarginLoss(2.0)) == "RationaleMarginLoss(margin=2.0, reduction='mean', ignore_index=-100)"
    criterion = RationaleMarginLoss(9.0, reduction="none", ignore_index=1)
    assert criterion(torch.zeros(2, 2), torch.zeros(2, 2), torch.tensor([0, 1])).tolist() == [9.0, 0.0]
