"""Loss balancing: coefficients that follow findings and accuracy, and epochs that end once."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import losses
from attn_callbacks.feedback.loss_balancing import LossBalancing
from tests.feedback.checkpoint import saved
from tests.feedback.feature_steps import finding, real_report, report

TERMS = {"feature": "reliance", "attention": "rationale"}


class Task(nn.Module):
    def __init__(self, strategy=None):
        super().__init__()
        self.balancer = losses.LossBalancer(
            ["label", "domain"], strategy, fixed={"reliance": 0.1, "rationale": 0.5, "sparsity": 1.0}
        )


def bound(task, **arguments):
    feedback = LossBalancing(**{"terms": TERMS, **arguments})
    feedback.bind(task)
    return feedback


def fixed(task):
    return {name: round(value, 6) for name, value in task.balancer.fixed.items()}


def test_terms_rise_while_their_finding_stays():
    task = Task()
    feedback = bound(task, limit=3.0)
    assert feedback.answers == {"feature", "attention"}
    (action,) = feedback.apply(report(finding("class", "positive", 0.5), finding("feature", "names")))
    assert str(action) == "reliance: coefficient 0.1 -> 0.2 (finding stays: feature names)"
    assert (action.finding, action.old, action.new) == (("feature", "names"), 0.1, 0.2)
    assert fixed(task) == {"reliance": 0.2, "rationale": 0.5, "sparsity": 1.0}
    feedback.apply(report(finding(), finding("attention", "positive")))
    assert fixed(task) == {"reliance": 0.3, "rationale": 1.0, "sparsity": 1.0}  # a multiple of 3 at most
    assert not feedback.apply(report(finding()))
    assert not feedback.apply(report())
    assert fixed(task) == {"reliance": 0.3, "rationale": 1.0, "sparsity": 1.0}


def test_candidates_raise_nothing():
    found = report(finding())
    found.reliance.clear()
    task = Task()
    assert not bound(task).apply(found)


def test_real_report():
    task = Task()
    bound(task).apply(real_report(names=60))
    assert fixed(task)["reliance"] == 0.2


def test_total_loss_feels_it():
    task = Task()
    values = {name: torch.tensor(1.0) for name in ("label", "domain", "reliance", "rationale", "sparsity")}
    before = float(task.balancer(values))
    bound(task).apply(report(finding()))
    assert float(task.balancer(values)) == pytest.approx(before + 0.1)


def test_falling_accuracy_takes_one_step_back_for_good():
    task = Task()
    feedback = bound(task)
    for _ in range(3):
        feedback.apply(report(finding(), accuracy=0.9))
    assert fixed(task)["reliance"] == 0.8
    (action,) = feedback.apply(report(finding(), accuracy=0.8))
    assert str(action) == "reliance: coefficient 0.8 -> 0.4 (accuracy 0.80 fell from 0.90)"
    assert fixed(task)["reliance"] == 0.4
    for _ in range(3):
        assert not feedback.apply(report(finding(), accuracy=0.9))
    assert fixed(task)["reliance"] == 0.4
    for _ in range(5):
        feedback.apply(report(finding(), accuracy=0.8))
    assert fixed(task) == {"reliance": 0.1, "rationale": 0.5, "sparsity": 1.0}  # never below what was set


@pytest.mark.parametrize(
    ("accuracy", "samples", "tolerance", "falls"),
    [
        (0.86, 200, 0.02, False),  # within two standard errors of 0.021
        (0.86, 20_000, 0.02, True),
        (0.86, 20_000, 0.05, False),
        (0.80, 200, 0.02, True),
        (math.nan, 200, 0.02, False),
    ],
)
def test_what_counts_as_a_fall(accuracy, samples, tolerance, falls):
    task = Task()
    feedback = bound(task, tolerance=tolerance)
    feedback.apply(report(finding(), accuracy=0.9, samples=samples))
    feedback.apply(report(accuracy=accuracy, samples=samples))
    assert fixed(task)["reliance"] == (0.1 if falls else 0.2)


def test_chance_alone_rarely_takes_a_step_back():
    drawn = np.random.default_rng(0).binomial(400, 0.8, (100, 20)) / 400
    backs = 0
    for run in drawn:
        task = Task()
        feedback = bound(task)
        texts = [
            str(action) for value in run for action in feedback.apply(report(finding(), accuracy=value, samples=400))
        ]
        backs += any("fell" in text for text in texts)
    assert backs < 15


def losses_of(balancer, epoch):
    values = {"label": 1.0 / (epoch + 1), "domain": 1.0, "reliance": 0.0, "rationale": 0.0, "sparsity": 0.0}
    return balancer({name: torch.tensor(value, requires_grad=True) for name, value in values.items()})


def test_epochs_end_once_however_often_they_are_validated():
    task, reference = (Task(losses.DynamicWeightAverage(2)) for _ in range(2))
    feedback, told = bound(task), []
    for epoch in range(4):
        for _ in range(3):
            for each in (task, reference):
                losses_of(each.balancer, epoch)
        reference.balancer.step()
        for _ in range(3):  # validations
            told.append([str(action) for action in feedback.apply(report(epoch=epoch))])
        assert torch.equal(task.balancer.strategy.weight, reference.balancer.strategy.weight)
    assert [len(each) for each in told] == [0, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0]
    assert told[3][0].startswith("weights of the losses: label 0.88, domain 1.12")


def test_module_that_ends_its_epochs_itself():
    task = Task(losses.DynamicWeightAverage(2))
    feedback = bound(task, step=False)
    losses_of(task.balancer, 0)
    feedback.apply(report())
    assert int(task.balancer.strategy.loss_count.sum()) == 2


def test_hold_leaves_coefficients_and_weights_and_yet_decides():
    task = Task(losses.DynamicWeightAverage(2))
    feedback = bound(task)
    feedback.hold(True)
    for epoch in range(3):
        losses_of(task.balancer, epoch)
        (action,) = feedback.apply(report(finding(), epoch=epoch))
        assert action.new == pytest.approx(0.1 * 2 ** (epoch + 1))
    assert fixed(task) == {"reliance": 0.1, "rationale": 0.5, "sparsity": 1.0}
    assert task.balancer.strategy.weight.tolist() == [1.0, 1.0]
    feedback.hold(False)
    assert fixed(task)["reliance"] == 0.8


def test_withdraw_gives_back_coefficients_and_weights():
    task = Task(losses.DynamicWeightAverage(2))
    feedback = bound(task)
    for epoch in range(3):
        losses_of(task.balancer, epoch)
        feedback.apply(report(finding(), epoch=epoch))
    assert task.balancer.strategy.weight.tolist() != [1.0, 1.0]
    resumed, fresh = bound(again := Task(losses.DynamicWeightAverage(2))), saved(feedback.state_dict())
    again.load_state_dict(task.state_dict())
    resumed.load_state_dict(fresh)
    for each, owner in ((feedback, task), (resumed, again)):
        each.withdraw()
        assert fixed(owner) == {"reliance": 0.1, "rationale": 0.5, "sparsity": 1.0}
        assert owner.balancer.strategy.weight.tolist() == [1.0, 1.0]
        each.apply(report(finding(), epoch=9))
        assert owner.balancer.strategy.weight.tolist() == [1.0, 1.0]
        assert fixed(owner)["reliance"] == 0.1


@pytest.mark.parametrize("order", ["load, bind", "bind, load", "other run, bind, load"])
def test_resume_is_bitwise(order):
    task, last = Task(losses.DynamicWeightAverage(2)), Task()
    feedback = bound(task, growth=1.7)
    for epoch in range(3):
        losses_of(task.balancer, epoch)
        feedback.apply(report(finding(), epoch=epoch, accuracy=0.9 - 0.2 * (epoch == 2)))
    again, module = LossBalancing(terms=TERMS, growth=1.7), Task(losses.DynamicWeightAverage(2))
    module.load_state_dict(task.state_dict())
    for action in order.split(", "):
        if action == "load":
            again.load_state_dict(saved(feedback.state_dict()))
        else:
            again.bind(module if action == "bind" else last)
    again.load_state_dict(saved(feedback.state_dict()))
    again.load_state_dict({})
    assert module.balancer.fixed == task.balancer.fixed
    assert str(again.state_dict()) == str(feedback.state_dict())
    for each, owner in ((feedback, task), (again, module)):
        losses_of(owner.balancer, 3)
        for epoch in (2, 3):
            each.apply(report(finding(), epoch=epoch))
    assert module.balancer.fixed == task.balancer.fixed
    assert torch.equal(module.balancer.strategy.weight, task.balancer.strategy.weight)


def test_same_module_goes_on_and_another_starts_anew():
    task, other = Task(), Task()
    feedback = bound(task)
    feedback.apply(report(finding()))
    feedback.bind(task)
    assert fixed(task)["reliance"] == 0.2
    twin = pickle.loads(pickle.dumps(feedback))
    twin.bind(other)
    assert fixed(other)["reliance"] == 0.2
    feedback.bind(third := Task())
    assert fixed(third)["reliance"] == 0.1
    feedback.apply(report(finding()))
    assert fixed(third)["reliance"] == 0.2
    assert fixed(task)["reliance"] == 0.2


def test_strategy_alone():
    task = Task()
    feedback = bound(task, terms=None)
    assert feedback.answers == frozenset()
    assert not feedback.apply(report(finding()))


@pytest.mark.parametrize(
    ("task", "arguments", "message"),
    [
        (nn.Linear(2, 2), {}, "Expected a `losses.LossBalancer` at `balancer` of Linear, got no such attribute"),
        (Task(), {"balancer": "balancer.strategy"}, "got EqualWeighting, which lacks"),
        (Task(), {"terms": {"feature": "other"}}, r"names \['other'\], but the `fixed` terms of `balancer` are"),
        (Task(), {"terms": {"feature": "label"}}, r"names \['label'\]"),
    ],
)
def test_wrong_modules_are_refused(task, arguments, message):
    with pytest.raises(ValueError, match=message):
        bound(task, **arguments)


def test_coefficient_of_zero_is_refused():
    task = Task()
    task.balancer.fixed["reliance"] = 0.0
    with pytest.raises(ValueError, match=r"coefficient of 'reliance' must be above 0 to be raised, got 0.0"):
        bound(task)


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (TypeError, {"terms": ["reliance"]}, "`terms` must map kinds of finding"),
        (ValueError, {"growth": 1}, "`growth` must be above 1 and finite, got 1"),
        (ValueError, {"limit": math.inf}, "`limit` must be above 1 and finite, got inf"),
        (ValueError, {"tolerance": -1}, "`tolerance` must lie between 0 and 1, got -1"),
    ],
)
def test_wrong_arguments_are_refused(error, arguments, message):
    with pytest.raises(error, match=message):
        LossBalancing(**arguments)


def test_without_a_module_it_says_so():
    with pytest.raises(ValueError, match=r"Call `bind\(module\)` first"):
        LossBalancing().apply(report())
