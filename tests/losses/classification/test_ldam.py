"""LDAM against plain numpy, deferred re-weighting, and the derivatives of the pass that it shares with others."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from losses.classification import LDAMLoss, effective_number_weights, ldam_loss, ldam_margins
from losses.classification._shifted import shifted_cross_entropy

GENERATOR = torch.Generator().manual_seed(19)


def randn(*shape):
    return torch.randn(*shape, generator=GENERATOR)


def cosines(*shape):
    return torch.rand(*shape, generator=GENERATOR) * 2 - 1


def labels(high, *shape):
    return torch.randint(high, shape, generator=GENERATOR)


def reference(logits, target, margins, scale):
    """Lower one score, scale all of them, take the log of the target's probability: one at a time, in float64."""
    losses = np.zeros(target.shape)
    for where in np.ndindex(*target.shape):
        if target[where] == -100:
            continue
        scores = logits[(where[0], slice(None), *where[1:])].astype(np.float64)
        scores[target[where]] -= margins[target[where]]
        scores *= scale
        losses[where] = np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[target[where]]
    return losses


def test_margins_are_those_of_the_paper():
    counts = np.array([5000.0, 16.0, 81.0, 625.0])
    raw = 1 / np.sqrt(np.sqrt(counts))
    np.testing.assert_allclose(ldam_margins(counts.tolist(), 0.4).numpy(), raw * (0.4 / raw.max()), rtol=1e-6)


def test_an_empty_class_has_the_largest_margin_and_changes_no_other():
    margins = ldam_margins([160, 0, 10])
    assert margins.tolist() == pytest.approx([0.25, 0.5, 0.5])
    torch.testing.assert_close(margins[[0, 2]], ldam_margins([160, 10]))


@pytest.mark.parametrize("positions", [(), (3,), (2, 3)])
@pytest.mark.parametrize("scale", [30.0, 1.0])
def test_against_loops(positions, scale):
    logits, target = cosines(6, 4, *positions), labels(4, 6, *positions)
    target[0] = -100
    margins = ldam_margins([500, 60, 7, 1])
    expected = reference(logits.numpy(), target.numpy(), margins.numpy().astype(np.float64), scale)
    given = ldam_loss(logits, target, margins=margins, scale=scale, reduction="none")
    np.testing.assert_allclose(given.numpy(), expected, rtol=1e-4, atol=2e-6)
    count = (target != -100).sum().item()
    criterion = LDAMLoss([500, 60, 7, 1], scale=scale)
    assert criterion(logits, target).item() == pytest.approx(expected.sum() / count, rel=1e-4)
    criterion = LDAMLoss([500, 60, 7, 1], scale=scale, reduction="sum")
    assert criterion(logits, target).item() == pytest.approx(expected.sum(), rel=1e-4)


@pytest.mark.parametrize("positions", [(), (3,)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_without_margin_and_scale_it_is_cross_entropy(positions, reduction):
    logits, target = randn(6, 4, *positions).requires_grad_(), labels(4, 6, *positions)
    target[0] = -100
    criterion = LDAMLoss([9, 5, 0, 1], max_margin=0.0, scale=1.0, reduction=reduction)
    ours, plain = criterion(logits, target), F.cross_entropy(logits, target, reduction=reduction)
    torch.testing.assert_close(ours, plain)
    (expected,) = torch.autograd.grad(plain.sum(), logits)
    torch.testing.assert_close(torch.autograd.grad(ours.sum(), logits)[0], expected)


def test_weights_of_class_group_and_sample():
    logits, target, margins = cosines(6, 3, 2), labels(3, 6, 2), ldam_margins([9, 3, 1])
    target[0, 1] = -100
    table, group, weight = torch.rand(2, 3), labels(2, 6), torch.rand(6, 2)
    plain = ldam_loss(logits, target, margins=margins, reduction="none")
    expected = plain * table[group[:, None], target.clamp(min=0)] * weight
    arguments = {"class_weight": table, "group": group, "sample_weight": weight}
    given = ldam_loss(logits, target, margins=margins, reduction="none", **arguments)
    torch.testing.assert_close(given, expected)
    given = ldam_loss(logits, target, margins=margins, **arguments)
    torch.testing.assert_close(given, expected.sum() / 11)


def test_the_margin_presses_on_a_sample_that_is_right_already():
    logits = torch.tensor([[0.9, 0.1]])
    plain, pressed = (LDAMLoss([9, 9], margin)(logits, torch.tensor([0])) for margin in (0.0, 0.5))
    assert pressed > 1000 * plain


@pytest.mark.parametrize("margin", [0.0, 3.0])
def test_large_scores_keep_the_digits_of_cross_entropy(margin):
    logits = torch.tensor([[40.0, 0.0, 0.0], [0.0, 9.0, 0.0], [-500.0, 0.0, 500.0], [-torch.inf, 8.0, 1.0]])
    target, margins = torch.tensor([0, 1, 0, 1]), torch.full((3,), margin)
    given = ldam_loss(logits, target, margins=margins, scale=2.0, reduction="none")
    exact = logits.double()
    exact[range(4), target] -= margin
    torch.testing.assert_close(
        given, F.cross_entropy(2 * exact, target, reduction="none").float(), rtol=1e-6, atol=1e-6
    )


def test_an_ignored_target_is_not_looked_up():
    logits, target = cosines(3, 2).requires_grad_(), torch.tensor([0, 255, 1])
    loss = LDAMLoss([9, 1], ignore_index=255)(logits, target)
    loss.backward()
    kept = LDAMLoss([9, 1])(logits[[0, 2]], target[[0, 2]])
    torch.testing.assert_close(loss, kept)
    assert logits.grad[1].eq(0).all()


@pytest.mark.parametrize("positions", [(), (2,)])
def test_first_and_second_derivatives(positions):
    logits, target = cosines(4, 3, *positions).double().requires_grad_(), labels(3, 4, *positions)
    target[0] = -100
    margins, weight = ldam_margins([9, 3, 1]).double(), torch.rand(3).double()

    def loss(scores):
        return ldam_loss(scores, target, margins=margins, scale=3.0, class_weight=weight, reduction="none")

    assert torch.autograd.gradcheck(loss, (logits,))
    assert torch.autograd.gradgradcheck(loss, (logits,))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 4), st.integers(1, 4), st.lists(st.integers(1, 3), max_size=2), st.integers(0, 10**6))
def test_the_fast_pass_is_the_plain_one(samples, classes, positions, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(samples, classes, *positions, generator=generator, requires_grad=True)
    target = torch.randint(classes, (samples, *positions), generator=generator)
    shift = torch.randn(classes, *[1] * len(positions), generator=generator)
    margin = torch.rand(target.shape, generator=generator)
    fast = shifted_cross_entropy(logits, target, 2.0, shift, margin)
    plain = shifted_cross_entropy(logits, target, 2.0, shift, margin.requires_grad_())  # a learned margin
    torch.testing.assert_close(fast, plain)
    upstream = torch.rand(target.shape, generator=generator)
    (given,), (expected,) = (torch.autograd.grad(loss, logits, upstream) for loss in (fast, plain))
    torch.testing.assert_close(given, expected)


def test_functional_gradient():
    logits, target, margins = cosines(4, 3), labels(3, 4), ldam_margins([9, 3, 1])
    given = torch.func.grad(lambda scores: ldam_loss(scores, target, margins=margins))(logits)
    leaf = logits.clone().requires_grad_()
    ldam_loss(leaf, target, margins=margins).backward()
    torch.testing.assert_close(given, leaf.grad)


def test_margins_can_be_learned():
    margins = torch.tensor([0.1, 0.2], requires_grad=True)
    ldam_loss(torch.zeros(2, 2), torch.tensor([1, 1]), margins=margins).backward()
    assert margins.grad[0] == 0
    assert margins.grad[1] > 0


def test_reweighting_starts_when_told_and_is_state():
    logits, target = cosines(5, 3), torch.tensor([0, 1, 2, 0, 0])
    criterion, other = LDAMLoss([900, 0, 10]), LDAMLoss([900, 0, 10])
    address = criterion.class_weight.data_ptr()
    before = criterion(logits, target)
    torch.testing.assert_close(before, criterion(logits, target, class_weight=torch.ones(3)))
    criterion.start_reweighting(beta=0.99)
    assert criterion.class_weight.data_ptr() == address
    weights = effective_number_weights([900, 0, 10], 0.99)
    torch.testing.assert_close(criterion.class_weight, weights)
    torch.testing.assert_close(criterion(logits, target), criterion(logits, target, class_weight=weights))
    assert list(criterion.state_dict()) == ["class_weight"]  # margins follow from the counts
    other.load_state_dict(criterion.state_dict())
    torch.testing.assert_close(other(logits, target), criterion(logits, target))


def test_reweighting_compiles_nothing_anew():
    torch.compiler.reset()
    counter, criterion = CompileCounter(), LDAMLoss([900, 90, 10])
    compiled = torch.compile(criterion, backend=counter, fullgraph=True)
    logits, target = cosines(5, 3), labels(3, 5)
    before = compiled(logits, target)
    criterion.start_reweighting()
    torch.testing.assert_close(compiled(logits, target), criterion(logits, target))
    assert compiled(logits, target) != before
    assert counter.frame_count == 1


def test_margins_move_with_the_module():
    """LDAM-DRW keeps them as a plain CUDA tensor."""
    assert LDAMLoss([9, 1]).to("meta").margins.is_meta


def test_half_precision_is_scaled_in_float32():
    logits = cosines(8, 3).half().requires_grad_()
    target = labels(3, 8)
    loss = LDAMLoss([9, 3, 1], scale=4096.0, reduction="sum")(logits, target)
    loss.backward()
    expected = LDAMLoss([9, 3, 1], scale=4096.0, reduction="sum")(logits.detach().float(), target)
    torch.testing.assert_close(loss, expected)
    assert logits.grad.dtype == torch.float16


def test_class_probabilities_are_refused():
    with pytest.raises(TypeError, match=r"`target` must hold integer class indices, got torch.float32"):
        LDAMLoss([9, 1])(torch.zeros(2, 2), torch.full((2, 2), 0.5))


def test_repr_builds_it_again():
    expected = "LDAMLoss([9, 1], max_margin=0.5, scale=30.0, reduction='mean', ignore_index=-100)"
    assert repr(LDAMLoss([9, 1])) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_margin": -0.1}, r"`max_margin` must be a finite number, at least 0, got -0.1"),
        ({"scale": float("inf")}, r"`scale` must be a finite number, at least 0, got inf"),
        ({"class_counts": [0, 0]}, r"`class_counts` must have a class with samples, got zeros only"),
    ],
)
def test_construction_checks(arguments, message):
    with pytest.raises(ValueError, match=message):
        LDAMLoss(**{"class_counts": [9, 1], **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"margins": torch.ones(2)}, r"`margins` must have shape \(classes,\) = \(3,\), got \(2,\)"),
        ({"margins": torch.tensor([0.1, -0.1, 0.0])}, r"`margins` must be at least 0, got -0.1"),
        ({"margins": torch.tensor([0.1, torch.nan, 0.0])}, r"`margins` must be at least 0, got nan"),
        ({"target": torch.tensor([3])}, r"`target` must lie between 0 and 2, got 3"),
        ({"target": torch.tensor([0, 1])}, r"`target` must have shape \(samples, positions...\) = \(1,\), got \(2,\)"),
        ({"scale": -1.0}, r"`scale` must be a finite number, at least 0, got -1.0"),
        ({"reduction": "max"}, r"`reduction` must be one of"),
        ({"class_weight": torch.ones(2, 3)}, r"one row for each of 2 groups, but `group` is missing"),
    ],
)
def test_call_checks(arguments, message):
    arguments = {"target": torch.tensor([0]), "margins": torch.ones(3), **arguments}
    with pytest.raises(ValueError, match=message):
        ldam_loss(torch.zeros(1, 3), arguments.pop("target"), **arguments)
