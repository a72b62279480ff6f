"""Ensemble feedback: who no longer sees what, whose loss weighs what, and how it is undone."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

import losses
from attn_callbacks.feedback.ensemble_feedback import EnsembleFeedback
from tests.feedback.checkpoint import saved
from tests.feedback.feature_steps import finding, real_report, report

SETS = {"border": (0, 3), "names": (1,)}
ALL = torch.ones(3, 4)


class Members(nn.Module):
    def __init__(self, masks=ALL, criterion_masks=None, weighted=(0, 2)):
        super().__init__()
        torch.manual_seed(0)
        self.model = losses.DeepEnsemble.of(lambda: nn.Linear(4, 2), members=3, masks=masks)
        members = [
            losses.WeightedCrossEntropyLoss(2) if number in weighted else nn.CrossEntropyLoss() for number in range(3)
        ]
        self.criterion = losses.EnsembleLoss(members, masks=masks if criterion_masks is None else criterion_masks)


def bound(module, features=None, criterion="criterion", **arguments):
    feedback = EnsembleFeedback(SETS if features is None else features, criterion=criterion, **arguments)
    feedback.bind(module)
    return feedback


def shown(module):
    """Return the masks as rows of 0 and 1."""
    return ["".join(str(int(seen)) for seen in row) for row in module.model.masks.flatten(1)]


def test_one_more_member_in_turn():
    module = Members()
    feedback = bound(module)
    (action,) = feedback.apply(report(finding(where="border"), measured=["names"]))
    assert str(action) == "border: hidden from member 0, now from 1 of 3"
    assert (action.finding, action.old, action.new) == (("feature", "border"), 0.0, 1.0)
    assert shown(module) == ["0110", "1111", "1111"]
    assert torch.equal(module.criterion.masks, module.model.masks)
    feedback.apply(report(finding(where="names"), finding(where="border", size=0.2)))
    assert shown(module) == ["0110", "1011", "0110"]  # the turn goes on, the larger finding first
    assert not feedback.apply(report(measured=SETS))
    assert not feedback.apply(report(finding(where="other")))
    assert shown(module) == ["0110", "1011", "0110"]


def test_real_report():
    module = Members()
    feedback = bound(module)
    feedback.apply(real_report(border=60, names=2))
    assert shown(module) == ["0110", "1111", "1111"]


def test_members_feel_it():
    module = Members()
    inputs = torch.ones(2, 4)
    before = module.model.member_logits(inputs)
    bound(module).apply(report(finding(where="border")))
    after = module.model.member_logits(inputs)
    torch.testing.assert_close(after[0], module.model.members[0](torch.tensor([[0.0, 1, 1, 0]] * 2)))
    assert torch.equal(after[1:], before[1:])


def test_no_member_goes_blind():
    module = Members(masks=torch.tensor([[1, 0, 0, 1], [1, 1, 0, 0], [0, 1, 1, 0]]))
    feedback = bound(module)
    for _ in range(3):
        feedback.apply(report(finding(where="border")))
    assert shown(module) == ["1001", "0100", "0110"]
    for _ in range(3):
        feedback.apply(report(finding(where="names")))
    assert shown(module) == ["1001", "0100", "0010"]
    assert not feedback.apply(report(finding(where="names"), finding(where="border")))


def test_features_by_mask():
    corner = torch.zeros(2, 2, dtype=torch.bool)
    corner[0, 1] = True
    module = Members(masks=torch.ones(3, 2, 2))
    feedback = bound(module, {"corner": corner, "right": [1]})
    feedback.apply(report(finding(where="corner")))
    feedback.apply(report(finding(where="right")))
    assert shown(module) == ["1011", "1010", "1111"]


def test_worst_class_becomes_the_concern_of_one_member():
    module = Members()
    feedback = bound(module, limit=3.0)
    tables = [module.criterion.members[number].class_weight for number in (0, 2)]
    worst, second = finding("class", "positive", 0.4), finding("class", "negative", 0.3)
    (action,) = feedback.apply(report(worst, second))
    assert str(action) == "positive: weight in the loss of member 0 x1 -> x2"
    assert action.finding == ("class", "positive")
    assert [table.tolist() for table in tables] == [[1, 2], [1, 1]]
    feedback.apply(report(second))
    assert [table.tolist() for table in tables] == [[1, 2], [2, 1]]
    feedback.apply(report(worst))
    assert [table.tolist() for table in tables] == [[1, 3], [2, 1]]
    assert not feedback.apply(report(worst))


def test_answers_class_bias_only_if_members_have_class_weights():
    found = report(finding("class", "positive"), finding(where="names"), finding(where="other"))
    modules = Members(), Members(weighted=())
    with_weights, without = (bound(module) for module in modules)
    assert {each.key for each in with_weights.answered(found)} == {("class", "positive"), ("feature", "names")}
    assert {each.key for each in without.answered(found)} == {("feature", "names")}
    assert len(without.apply(found)) == 1
    assert bound(Members(), criterion=None).answers == {"feature"}


def test_hold_leaves_everything_and_yet_decides():
    module = Members()
    feedback = bound(module)
    feedback.hold(True)
    actions = feedback.apply(report(finding(where="border"), finding("class", "positive")))
    assert [action.new for action in actions] == [1.0, 2.0]
    assert shown(module) == ["1111"] * 3
    assert module.criterion.members[0].class_weight.tolist() == [1, 1]
    feedback.hold(False)
    assert shown(module) == ["0110", "1111", "1111"]
    assert module.criterion.members[0].class_weight.tolist() == [1, 2]


@pytest.mark.parametrize("order", ["load, bind", "bind, load", "weights, bind, load"])
def test_resume_and_withdraw(order):
    start = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 1], [1, 1, 1, 1]])
    module = Members(start)
    feedback = bound(module)
    for _ in range(2):
        feedback.apply(report(finding(where="border"), finding("class", "positive")))
    again, resumed = EnsembleFeedback(SETS, criterion="criterion"), Members(start)
    for action in order.split(", "):
        if action == "load":
            again.load_state_dict(saved(feedback.state_dict()))
        elif action == "weights":
            resumed.load_state_dict(module.state_dict())
        else:
            again.bind(resumed)
    resumed.load_state_dict(module.state_dict())
    again.load_state_dict(saved(feedback.state_dict()))
    again.load_state_dict({})
    assert str(again.state_dict()) == str(feedback.state_dict())
    for each in (feedback, again):
        each.apply(report(finding(where="names"), finding("class", "negative")))
    for name, value in module.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)
    assert shown(resumed) == ["0110", "0100", "1011"]
    for each, owner in ((feedback, module), (again, resumed)):
        each.withdraw()
        assert torch.equal(owner.model.masks, start.bool())
        assert torch.equal(owner.criterion.masks, start.bool())
        assert all(owner.criterion.members[number].class_weight.tolist() == [1, 1] for number in (0, 2))


def test_same_module_goes_on_and_another_starts_anew():
    module, other, third = Members(), Members(), Members()
    feedback = bound(module)
    feedback.apply(report(finding(where="border")))
    feedback.bind(module)
    assert shown(module) == ["0110", "1111", "1111"]
    twin = pickle.loads(pickle.dumps(feedback))
    twin.bind(other)
    assert shown(other) == ["0110", "1111", "1111"]
    feedback.bind(third)
    assert shown(third) == ["1111"] * 3
    feedback.withdraw()
    assert shown(module) == ["0110", "1111", "1111"]


def test_ensemble_without_a_criterion():
    module = Members()
    bound(module, criterion=None).apply(report(finding(where="border")))
    assert shown(module)[0] == "0110"
    assert bool(module.criterion.masks.all())


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (nn.Linear(2, 2), {}, "Expected a `losses.DeepEnsemble` at `model` of Linear, got no such attribute"),
        (Members(masks=None, criterion_masks=ALL), {}, "got DeepEnsemble without `members` or `masks`"),
        (Members(), {"criterion": "loss"}, "Expected a `losses.EnsembleLoss` at `loss`"),
        (Members(criterion_masks=torch.ones(3, 2)), {}, r"masks of shape \(3, 2\), `model` of \(3, 4\)"),
        (Members(), {"features": {"border": [4]}}, "must name features from 0 to 3, got"),
        (Members(), {"features": {"border": []}}, "must name features from 0 to 3"),
        (Members(), {"features": {"border": torch.ones(3).bool()}}, r"must have shape \(4,\) as the masks, got \(3,\)"),
    ],
)
def test_wrong_modules_are_refused(module, arguments, message):
    with pytest.raises(ValueError, match=message):
        bound(module, **arguments)


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (TypeError, {"features": ["border"]}, "`features` must map the name of each set"),
        (ValueError, {"growth": 1.0}, "`growth` must be above 1 and finite"),
        (ValueError, {"limit": 0.5}, "`limit` must be above 1 and finite"),
    ],
)
def test_wrong_arguments_are_refused(error, arguments, message):
    with pytest.raises(error, match=message):
        EnsembleFeedback(**{"features": SETS, **arguments})


def test_without_a_module_it_says_so():
    with pytest.raises(ValueError, match=r"Call `bind\(module\)` first"):
        EnsembleFeedback(SETS).apply(report())
