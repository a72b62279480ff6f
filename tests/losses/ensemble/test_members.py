"""An ensemble with a loss and a feature mask for each member."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from losses import WeightedCrossEntropyLoss
from losses.ensemble import EnsembleLoss, NegativeCorrelationLoss, ambiguity_decomposition

GENERATOR = torch.Generator().manual_seed(14)
MASKS = [[1, 1, 0, 0], [0, 1, 1, 1]]


def randn(*shape):
    return torch.randn(*shape, generator=GENERATOR)


def labels(high, *shape):
    return torch.randint(high, shape, generator=GENERATOR)


def two_losses():
    return [nn.CrossEntropyLoss(), WeightedCrossEntropyLoss(3, [1.0, 5.0, 0.2])]


def test_every_member_has_its_own_loss():
    logits, target = randn(2, 6, 3), labels(3, 6)
    output = EnsembleLoss(two_losses())(logits, target)
    expected = torch.stack([loss(member, target) for loss, member in zip(two_losses(), logits, strict=True)])
    torch.testing.assert_close(output.member_losses, expected)
    torch.testing.assert_close(output.loss, expected.mean())


def test_the_report_is_the_decomposition_of_plain_cross_entropy():
    logits, target = randn(2, 6, 3), labels(3, 6)
    target[0] = -100
    output = EnsembleLoss(two_losses())(list(logits), target)
    parts = ambiguity_decomposition(logits, target)
    torch.testing.assert_close(output.ensemble_loss, parts.ensemble_loss)
    torch.testing.assert_close(output.ambiguity, parts.ambiguity)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(members=st.integers(1, 4), samples=st.integers(1, 5), classes=st.integers(2, 4), seed=st.integers(0, 99))
def test_with_cross_entropies_the_loss_less_ambiguity_is_the_ensembles(members, samples, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(members, samples, classes, generator=generator)
    target = torch.randint(classes, (samples,), generator=generator)
    output = EnsembleLoss([nn.CrossEntropyLoss()] * members)(logits, target)
    torch.testing.assert_close(output.loss - output.ambiguity, output.ensemble_loss, rtol=1e-6, atol=1e-6)
    expected = F.nll_loss(logits.softmax(dim=2).mean(dim=0).log(), target)
    torch.testing.assert_close(output.ensemble_loss, expected, rtol=1e-4, atol=1e-5)
    assert output.ambiguity >= -1e-5


def test_only_the_loss_trains_and_members_do_not_mix():
    logits, target = randn(2, 6, 3).requires_grad_(), labels(3, 6)
    output = EnsembleLoss(two_losses())(logits, target)
    assert not output.ensemble_loss.requires_grad
    assert not output.ambiguity.requires_grad
    output.member_losses[0].backward()
    assert logits.grad[0].ne(0).any()
    assert logits.grad[1].eq(0).all()


def test_the_reports_ignore_index():
    logits, target = randn(2, 6, 3), torch.tensor([0, 1, 2, 2, 1, 0])
    criterion = EnsembleLoss([nn.CrossEntropyLoss(ignore_index=1)] * 2, ignore_index=1)
    output = criterion(logits, target)
    torch.testing.assert_close(output.loss - output.ambiguity, output.ensemble_loss)


def test_arguments_reach_every_member():
    logits, target, sample_weight = randn(2, 6, 3), labels(3, 6), torch.rand(6)
    losses = [WeightedCrossEntropyLoss(3), WeightedCrossEntropyLoss(3, [1.0, 5.0, 0.2])]
    output = EnsembleLoss(losses)(logits, target, sample_weight=sample_weight)
    expected = torch.stack(
        [loss(member, target, sample_weight=sample_weight) for loss, member in zip(losses, logits, strict=True)]
    )
    torch.testing.assert_close(output.member_losses, expected)


@pytest.mark.parametrize(
    ("inputs", "masks"),
    [
        (torch.ones(5, 4), torch.tensor(MASKS)),
        (torch.ones(5, 7, 4), torch.tensor(MASKS)),  # tokens with features
        (torch.ones(5, 3, 2, 4), torch.ones(2, 1, 4)),  # one mask for all rows of an image
        (torch.ones(5, 3, 2, 4), torch.tensor(MASKS).reshape(2, 2, 2).repeat(1, 1, 2)),  # a mask of pixels
    ],
)
def test_views_hide_features(inputs, masks):
    views = EnsembleLoss(two_losses(), masks=masks).views(inputs)
    assert views.shape == (2, *inputs.shape)
    for member in range(2):
        torch.testing.assert_close(views[member], inputs * masks[member])


def test_views_keep_the_dtype_and_hide_missing_values():
    criterion = EnsembleLoss(two_losses(), masks=MASKS)
    tokens = torch.tensor([[7, 8, 9, 4]])
    assert criterion.views(tokens).tolist() == [[[7, 8, 0, 0]], [[0, 8, 9, 4]]]
    assert criterion.views(tokens > 0).dtype == torch.bool
    assert criterion.views(tokens.half()).dtype == torch.float16
    inputs = torch.tensor([[torch.nan, 1.0, 2.0, 3.0]], requires_grad=True)
    seen = criterion.views(inputs)[1]
    seen.sum().backward()
    assert seen.isfinite().all()
    torch.testing.assert_close(inputs.grad, torch.tensor([[0.0, 1.0, 1.0, 1.0]]))


def test_without_masks_everybody_sees_everything():
    inputs = randn(5, 4)
    views = EnsembleLoss(two_losses()).views(inputs)
    torch.testing.assert_close(views, torch.stack([inputs, inputs]))


def test_a_member_learns_nothing_from_what_it_does_not_see():
    criterion = EnsembleLoss(two_losses(), masks=MASKS)
    members = [nn.Linear(4, 3) for _ in range(2)]
    views = criterion.views(randn(8, 4))
    output = criterion([member(view) for member, view in zip(members, views, strict=True)], labels(3, 8))
    output.loss.backward()
    for member, mask in zip(members, MASKS, strict=True):
        seen = member.weight.grad.ne(0).any(dim=0)
        assert seen.tolist() == [bool(bit) for bit in mask]


def test_masks_and_weights_survive_the_state_dict():
    used, fresh = EnsembleLoss(two_losses(), masks=MASKS), EnsembleLoss(two_losses(), masks=torch.ones(2, 4))
    used.members[1].set_class_weight([9.0, 1.0, 1.0])
    fresh.load_state_dict(used.state_dict())
    torch.testing.assert_close(fresh.masks, used.masks)
    torch.testing.assert_close(fresh.members[1].class_weight, used.members[1].class_weight)


def test_a_checkpoint_of_a_plain_criterion_loads():
    criterion = EnsembleLoss([nn.CrossEntropyLoss()] * 2, masks=MASKS)
    with pytest.warns(UserWarning, match="lacks state of EnsembleLoss"):
        criterion.load_state_dict(nn.CrossEntropyLoss().state_dict(), strict=True)
    assert criterion.masks.tolist() == [[bool(bit) for bit in mask] for mask in MASKS]


def test_repr_shows_settings_and_members():
    shown = repr(EnsembleLoss(two_losses(), masks=MASKS))
    assert "masks=of shape (2, 4), ignore_index=-100" in shown
    assert "WeightedCrossEntropyLoss(3" in shown


@pytest.mark.parametrize(
    ("members", "arguments", "error", "message"),
    [
        ([], {}, ValueError, "`members` must hold the loss of at least one member, got none"),
        ([F.cross_entropy], {}, TypeError, r"`members\[0\]` must be a loss module, got function"),
        (
            two_losses(),
            {"masks": [[1, 0]]},
            ValueError,
            r"`masks` must have shape \(members, features...\) = \(2, ...\)",
        ),
        (two_losses(), {"masks": [1, 1]}, ValueError, r"`masks` must have shape .* got \(2,\)"),
        (two_losses(), {"masks": [[1, 0], [0, 0]]}, ValueError, "every member a feature, got none for member 1"),
    ],
)
def test_checks_at_construction(members, arguments, error, message):
    with pytest.raises(error, match=message):
        EnsembleLoss(members, **arguments)


def test_checks_of_a_call():
    criterion, target = EnsembleLoss(two_losses(), masks=MASKS), torch.zeros(6).long()
    with pytest.raises(ValueError, match="`logits` must hold those of 2 members, got 3"):
        criterion(torch.zeros(3, 6, 3), target)
    with pytest.raises(ValueError, match=r"`members\[1\]` must return one number, got shape \(6,\): build it with"):
        EnsembleLoss([nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="none")])(torch.zeros(2, 6, 3), target)
    with pytest.raises(ValueError, match=r"features \(4,\) of `masks`, got \(6, 5\)"):
        criterion.views(torch.zeros(6, 5))
    with pytest.raises(ValueError, match=r"features \(2, 2\) of `masks`, got \(6, 2\)"):
        EnsembleLoss(two_losses(), masks=torch.ones(2, 2, 2)).views(torch.zeros(6, 2))
    with pytest.raises(TypeError, match="`inputs` must be a tensor, got list"):
        criterion.views([1.0])


def test_a_loss_over_members_is_no_members_loss():
    with pytest.raises(ValueError, match="at least one member"):
        EnsembleLoss([NegativeCorrelationLoss()])(torch.zeros(1, 6, 3), torch.zeros(6).long())
