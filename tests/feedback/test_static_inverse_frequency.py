"""The control that weighs by inverse frequency: what it sets, when, and that it then rests."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attn_callbacks.bias import BiasReport
from attn_callbacks.feedback.static_inverse_frequency import StaticInverseFrequency
from losses import LogitAdjustedLoss, WeightedCrossEntropyLoss
from tests.feedback.checkpoint import saved

FED = torch.tensor([[40, 20], [30, 10]])
COUNTS = torch.tensor([[[90, 10], [50, 50]], [[90, 10], [50, 50]]])


def module(by="class", **arguments):
    target = nn.Module()
    target.criterion = WeightedCrossEntropyLoss(2, **({} if by == "class" else {"num_groups": 2}), **arguments)
    return target


def report(fed=FED):
    return BiasReport(0, 0, COUNTS, ("negative", "positive"), ("Amazon", "Tweets"), train_counts=fed)


def bound(target, by="class"):
    feedback = StaticInverseFrequency(by=by)
    feedback.bind(target)
    return feedback


@pytest.mark.parametrize(
    ("by", "counts", "cells"),
    [
        ("class", [70.0, 30.0], 2),
        ("group", [[60.0, 60.0], [40.0, 40.0]], 2),
        ("cell", [[40.0, 20.0], [30.0, 10.0]], 4),
    ],
)
def test_each_gets_the_same_share_of_the_loss(by, counts, cells):
    target = module(by)
    actions = bound(target, by).apply(report())
    # of 100 samples, each of the cells shall have an even share
    torch.testing.assert_close(target.criterion.class_weight, 100 / cells / torch.tensor(counts))
    assert all(action.finding is None for action in actions)
    assert len(actions) == cells
    assert actions[0].new == pytest.approx(float(target.criterion.class_weight.max()))


def test_nothing_before_it_is_known_and_nothing_after():
    target = module()
    feedback = bound(target)
    for unknown in (None, torch.zeros(2, 2, dtype=torch.int64)):
        assert feedback.apply(report(unknown)) == ()
        assert target.criterion.class_weight.tolist() == [1.0, 1.0]
    assert len(feedback.apply(report())) == 2
    weight = target.criterion.class_weight.clone()
    assert feedback.apply(report(torch.tensor([[1, 90], [1, 90]]))) == ()
    assert torch.equal(target.criterion.class_weight, weight)


def test_what_was_never_seen_keeps_its_weight():
    target = module("cell")
    bound(target, "cell").apply(report(torch.tensor([[40, 20], [40, 0]])))
    torch.testing.assert_close(target.criterion.class_weight, torch.tensor([[5 / 6, 5 / 3], [5 / 6, 1.0]]))


@pytest.mark.parametrize("bind_first", [True, False])
@pytest.mark.parametrize("reports", [1, 2])
def test_resumed_it_stays_what_it_was(bind_first, reports):
    target, resumed = module(), module()
    feedback, second = bound(target), StaticInverseFrequency()
    for fed in (None, FED)[:reports]:
        feedback.apply(report(fed))
    if bind_first:
        second.bind(resumed)
    second.load_state_dict(saved(feedback.state_dict()))
    second.bind(resumed)
    assert torch.equal(resumed.criterion.class_weight, target.criterion.class_weight)
    later = report(torch.tensor([[1, 90], [1, 90]]))
    assert second.apply(later) == feedback.apply(later)
    assert torch.equal(resumed.criterion.class_weight, target.criterion.class_weight)


def test_held_or_withdrawn_the_loss_is_as_it_was():
    target = module(weight=[1.0, 3.0])
    feedback = bound(target)
    feedback.hold(True)
    assert len(feedback.apply(report())) == 2
    assert target.criterion.class_weight.tolist() == [1.0, 3.0]
    feedback.hold(False)
    torch.testing.assert_close(target.criterion.class_weight, torch.tensor([50 / 70, 50 / 30]))
    feedback.withdraw()
    assert target.criterion.class_weight.tolist() == [1.0, 3.0]


def test_weights_it_is_also_where_the_loss_has_shifts():
    target = nn.Module()
    target.criterion = LogitAdjustedLoss([1, 1])
    bound(target).apply(report())
    assert target.criterion.adjustment[0] == target.criterion.adjustment[1]
    torch.testing.assert_close(target.criterion.class_weight, torch.tensor([50 / 70, 50 / 30]))


def test_answers_repr_and_refusals():
    assert StaticInverseFrequency().answers == frozenset()
    assert repr(eval(repr(StaticInverseFrequency("loss", "cell")))) == "StaticInverseFrequency('loss', 'cell')"
    with pytest.raises(ValueError, match="`by` must be one of 'class', 'group', 'cell', got 'sample'"):
        StaticInverseFrequency(by="sample")
    with pytest.raises(ValueError, match=r"by='cell' needs `criterion.class_weight` of shape \(groups, classes\)"):
        bound(module(), "cell")
