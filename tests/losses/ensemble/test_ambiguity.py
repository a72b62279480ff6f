"""The ambiguity decomposition: an identity, a sign, and the mean probabilities behind it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from losses.ensemble import ambiguity_decomposition


def drawn(members, samples, classes, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(members, samples, classes, generator=generator)
    return logits, torch.randint(classes, (samples,), generator=generator)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_against_loops(reduction):
    logits, target = drawn(3, 5, 4)
    target[2] = -100
    members, ensemble = np.zeros(5), np.zeros(5)
    for n in (0, 1, 3, 4):
        scores = np.exp(logits[:, n].double().numpy())
        shares = scores / scores.sum(axis=1, keepdims=True)
        members[n] = np.mean([-np.log(p[target[n]]) for p in shares])
        ensemble[n] = -np.log(np.mean(shares, axis=0)[target[n]])
    parts = ambiguity_decomposition(logits, target, reduction=reduction)
    fold = {"mean": lambda x: x.sum() / 4, "sum": np.sum, "none": lambda x: x}[reduction]
    np.testing.assert_allclose(parts.member_loss.numpy(), fold(members), rtol=1e-5)
    np.testing.assert_allclose(parts.ensemble_loss.numpy(), fold(ensemble), rtol=1e-5)
    np.testing.assert_allclose(parts.ambiguity.numpy(), fold(members - ensemble), rtol=1e-4, atol=1e-6)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    members=st.integers(1, 5),
    samples=st.integers(1, 4),
    classes=st.integers(1, 5),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    seed=st.integers(0, 99),
)
def test_the_identity_holds_and_ambiguity_is_never_negative(members, samples, classes, scale, seed):
    logits, target = drawn(members, samples, classes, seed, scale)
    parts = ambiguity_decomposition(logits, target, reduction="none")
    torch.testing.assert_close(parts.member_loss - parts.ambiguity, parts.ensemble_loss, rtol=1e-6, atol=1e-6)
    assert (parts.ambiguity >= -1e-5).all()


def test_members_that_agree_have_no_ambiguity():
    logits, target = drawn(1, 6, 3)
    parts = ambiguity_decomposition(logits.expand(4, -1, -1), target)
    assert parts.ambiguity.item() == pytest.approx(0.0, abs=1e-6)
    torch.testing.assert_close(parts.ensemble_loss, F.cross_entropy(logits[0], target))


def test_the_most_two_members_can_gain():
    logits = torch.tensor([[[30.0, 0.0]], [[0.0, 30.0]]])
    parts = ambiguity_decomposition(logits, torch.tensor([0]))
    assert parts.ensemble_loss.item() == pytest.approx(np.log(2), rel=1e-5)
    assert parts.member_loss.item() == pytest.approx(15.0, rel=1e-5)


def test_far_apart_logits_do_not_overflow_or_vanish():
    logits, target = drawn(3, 6, 4, scale=1e4)
    logits.requires_grad_()
    parts = ambiguity_decomposition(logits, target)
    sum(parts).backward()
    assert all(part.isfinite() for part in parts)
    assert logits.grad.isfinite().all()


def test_a_class_that_every_member_rules_out_keeps_gradients_finite():
    logits, target = drawn(3, 6, 4)
    logits[:, :, 3] = -torch.inf
    logits.requires_grad_()
    ambiguity_decomposition(logits, target.clamp(max=2)).ensemble_loss.backward()
    assert logits.grad.isfinite().all()
    assert logits.grad.ne(0).any()


def test_soft_targets_and_weights():
    logits, target = drawn(3, 6, 4)
    weight, sample_weight = torch.rand(4), torch.rand(6)
    arguments = {"class_weight": weight, "sample_weight": sample_weight}
    hard = ambiguity_decomposition(logits, target, **arguments)
    soft = ambiguity_decomposition(logits, F.one_hot(target, 4).float(), **arguments)
    for one, other in zip(hard, soft, strict=True):
        torch.testing.assert_close(one, other)
    expected = F.nll_loss(logits.softmax(2).mean(0).log(), target, weight=weight, reduction="none") * sample_weight
    torch.testing.assert_close(hard.ensemble_loss, expected.mean())


def test_gradcheck():
    logits, target = drawn(3, 4, 3)
    assert torch.autograd.gradcheck(
        lambda z: ambiguity_decomposition(z, target).ambiguity, (logits.double().requires_grad_(),)
    )


def test_checks():
    with pytest.raises(ValueError, match="`logits` must hold the logits of at least one member"):
        ambiguity_decomposition([], torch.zeros(3).long())
    with pytest.raises(ValueError, match=r"`target` must have shape \(samples, positions...\) = \(3,\)"):
        ambiguity_decomposition(torch.zeros(2, 3, 4), torch.zeros(2).long())
