"""Input-gradient penalty as feedback: the term, its calibration over a resume, when it acts."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

import losses
from attn_callbacks.feedback import input_gradient
from attn_callbacks.feedback.input_gradient import InputGradientPenalty
from tests.feedback.checkpoint import saved
from tests.feedback.feature_steps import FakeStep, SumOfTokens, finding, report

SPURIOUS = torch.tensor([[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]).bool()
TARGET = torch.tensor([0, 1, 1])


def step(seed=0, model=None, **regions):
    random = torch.Generator().manual_seed(seed)
    if model is None:
        torch.manual_seed(0)
        model = SumOfTokens()
    inputs = torch.randn(3, 4, 3, generator=random)
    return FakeStep(model, inputs, TARGET, seed, **(regions or {"spurious": SPURIOUS}))


def plain(strength=1.0):
    return losses.InputGradientPenalty(strength, calibration_steps=0)


def test_term_is_the_masked_squared_gradient_by_hand():
    fed = step()
    term = InputGradientPenalty(plain(0.5), when="always").term(fed)
    (gradient,) = torch.autograd.grad(fed.logits.log_softmax(dim=1).sum(), fed.inputs, retain_graph=True)
    squares = (gradient[SPURIOUS] ** 2).sum()
    torch.testing.assert_close(term.detach(), 0.5 * squares / 2)  # two samples have any of it
    term.backward()
    assert fed.model.hidden.weight.grad.abs().sum() > 0


def test_it_asks_for_inputs_and_operations_that_can_be_differentiated_twice():
    feedback = InputGradientPenalty(plain())
    assert feedback.sees == {"inputs"}
    assert feedback.second_order


def test_named_region():
    fed = step(names=SPURIOUS)
    assert InputGradientPenalty(plain(), when="always").term(fed) is None
    named = InputGradientPenalty(plain(), region="names", when="always").term(fed)
    assert torch.equal(named, InputGradientPenalty(plain(), when="always").term(step()))


def test_waits_for_reliance_and_stays_on():
    feedback = InputGradientPenalty(plain(0.1))
    assert feedback.term(step()) is None
    assert not feedback.apply(report(finding(where="names"), finding("group", "spurious")))
    (action,) = feedback.apply(report(finding()))
    assert str(action).startswith("input-gradient penalty switched on with strength 0.1 (Accuracy falls")
    assert action.finding == ("feature", "spurious")
    assert not feedback.apply(report(finding()))
    assert feedback.term(step()) > 0


def test_calibration_begins_when_switched_on_and_is_resumed_bitwise():
    def run(feedback, steps):
        return [feedback.term(step(seed)) for seed in steps]

    def new():
        return InputGradientPenalty(losses.InputGradientPenalty(1.0, calibration_steps=3))

    whole, first = new(), new()
    for feedback in (whole, first):
        run(feedback, range(2))
        assert int(feedback.penalty.steps) == 0
        feedback.apply(report(finding()))
    expected = run(whole, range(6))
    assert all(float(term.detach()) == 0 for term in expected[:3])
    assert expected[3] > 0
    run(first, range(2))
    resumed = new()
    resumed.load_state_dict(saved(first.state_dict()))
    for term, other in zip(run(resumed, range(2, 6)), expected[2:], strict=True):
        assert torch.equal(term, other)
    for name, value in whole.state_dict()["penalty"].items():
        assert torch.equal(resumed.state_dict()["penalty"][name], value)


def test_state_is_a_copy():
    feedback = InputGradientPenalty(losses.InputGradientPenalty(1.0, calibration_steps=3), when="always")
    state = feedback.state_dict()
    feedback.term(step())
    assert float(state["penalty"]["measured"].sum()) == 0


def test_held_or_withdrawn_adds_and_measures_nothing():
    feedback = InputGradientPenalty(losses.InputGradientPenalty(1.0, calibration_steps=3))
    feedback.hold(True)
    assert len(feedback.apply(report(finding()))) == 1
    assert feedback.term(step()) is None
    assert int(feedback.penalty.steps) == 0
    feedback.hold(False)
    assert feedback.term(step()) is not None
    feedback.withdraw()
    assert feedback.term(step()) is None
    resumed = InputGradientPenalty(plain())
    resumed.load_state_dict(saved(feedback.state_dict()))
    assert resumed.withdrawn
    assert not resumed.active


def test_process_without_a_mark_takes_part_in_what_is_added_up(monkeypatch):
    feedback = InputGradientPenalty(losses.InputGradientPenalty(1.0, calibration_steps=3), when="always")
    called = []
    feedback.penalty.register_forward_hook(lambda *_: called.append(True))
    assert feedback.term(step(valid=SPURIOUS)) is None
    assert not called
    monkeypatch.setattr(input_gradient, "_many_processes", lambda: True)
    assert feedback.term(step(valid=SPURIOUS)) is None
    assert called


def test_another_module_measures_anew():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    feedback = InputGradientPenalty(losses.InputGradientPenalty(1.0, calibration_steps=3), when="always")
    feedback.bind(first)
    feedback.term(step())
    feedback.bind(first)
    assert int(feedback.penalty.steps) == 1
    twin = pickle.loads(pickle.dumps(feedback))
    assert int(twin.penalty.steps) == 1
    feedback.bind(second)
    assert int(feedback.penalty.steps) == 0
    assert float(feedback.penalty.measured.sum()) == 0
    assert feedback.active


@pytest.mark.parametrize(
    ("error", "penalty", "message"),
    [
        (TypeError, print, "`penalty` must be a module such as `losses.InputGradientPenalty"),
        (ValueError, nn.Linear(2, 2), "must have no learnable parameters, got Linear with some"),
    ],
)
def test_wrong_penalties_are_refused(error, penalty, message):
    with pytest.raises(error, match=message):
        InputGradientPenalty(penalty)


def test_penalty_that_is_not_a_scalar_is_refused():
    feedback = InputGradientPenalty(losses.InputGradientPenalty(calibration_steps=0, reduction="none"), when="always")
    with pytest.raises(ValueError, match=r"`penalty` must return a scalar, got shape \(3,\). Use reduction='mean'"):
        feedback.term(step())
