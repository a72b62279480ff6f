"""Adversarial training as feedback: where inputs are attacked, with which random numbers, and when."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import losses
from attn_callbacks.feedback.adversarial_training import AdversarialTraining
from tests.feedback.checkpoint import saved
from tests.feedback.feature_steps import FakeStep, SumOfTokens, finding, report

SPURIOUS = torch.tensor([[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]).bool()
VALID = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]]).bool()
TARGET = torch.tensor([0, 1, 1])


class Recording(nn.Module):
    """An attack that notes what it is called with."""

    def forward(self, closure, inputs, mask=None):
        self.closure, self.inputs, self.mask = closure, inputs, mask
        return closure(inputs + 1)


def step(seed=0, target=TARGET, dropout=0.0, **regions):
    torch.manual_seed(0)
    model = SumOfTokens(dropout=dropout)
    inputs = torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(7))
    return FakeStep(model, inputs, target, seed, **(regions or {"spurious": SPURIOUS, "valid": VALID}))


def test_term_is_the_loss_after_one_sign_step_in_the_region():
    fed = step()
    feedback = AdversarialTraining(losses.FGM(0.5, norm="linf"), coefficient=3.0, when="always")
    term = feedback.term(fed)
    (gradient,) = torch.autograd.grad(F.cross_entropy(fed.logits, TARGET), fed.inputs, retain_graph=True)
    attacked = fed.inputs + 0.5 * gradient.sign() * SPURIOUS[..., None]
    torch.testing.assert_close(term, 3.0 * F.cross_entropy(fed.model(attacked), TARGET))
    assert term > 3.0 * fed.loss
    term.backward()
    assert fed.model.hidden.weight.grad.abs().sum() > 0
    assert feedback.sees == {"inputs"}


@pytest.mark.parametrize(
    ("region", "regions", "expected"),
    [
        ("spurious", {"spurious": SPURIOUS, "valid": VALID}, SPURIOUS),
        ("names", {"names": ~SPURIOUS}, ~SPURIOUS),
        (None, {"spurious": SPURIOUS, "valid": VALID}, VALID),
        (None, {"spurious": SPURIOUS}, None),
    ],
)
def test_region(region, regions, expected):
    feedback = AdversarialTraining(Recording(), region=region, when="always")
    fed = step(**regions)
    torch.testing.assert_close(feedback.term(fed), F.cross_entropy(fed.model(fed.inputs + 1), TARGET))
    assert feedback.attack.inputs is fed.inputs
    assert expected is feedback.attack.mask is None or torch.equal(feedback.attack.mask, expected)


def test_batch_without_the_region_is_left_alone():
    fed = step(valid=VALID)
    assert AdversarialTraining(losses.FGM(), when="always").term(fed) is None
    assert fed.forwards == 0


@pytest.mark.parametrize("shape", [(3, 1), (3,)])
def test_a_single_logit_takes_the_binary_cross_entropy(shape):
    fed = step()
    fed.model = lambda inputs: inputs.sum(dim=(1, 2)).reshape(shape)
    term = AdversarialTraining(Recording(), when="always").term(fed)
    logits = (fed.inputs + 1).sum(dim=(1, 2))
    torch.testing.assert_close(term, F.cross_entropy(torch.stack([torch.zeros(3), logits], dim=1), TARGET))


@pytest.mark.parametrize("shape", [(3, 1), (3,)])
def test_attacks_on_a_single_logit_see_both_classes(shape):
    class Summed(nn.Module):
        def forward(self, closure, inputs, mask=None):
            return (closure(inputs) * torch.tensor([100.0, 1.0])).sum()

    fed = step()
    fed.model = lambda inputs: inputs.sum(dim=(1, 2)).reshape(shape)
    term = AdversarialTraining(Summed(), closure="logits", when="always").term(fed)
    torch.testing.assert_close(term, fed.inputs.sum())
    attack = losses.VirtualAdversarialLoss(0.5)
    assert AdversarialTraining(attack, closure="logits", when="always").term(fed) > 0


def test_own_loss():
    feedback = AdversarialTraining(Recording(), lambda logits, target: logits[target == 0].sum(), when="always")
    fed = step()
    torch.testing.assert_close(feedback.term(fed), fed.model(fed.inputs + 1)[0].sum())


@pytest.mark.parametrize("attack", [losses.VirtualAdversarialLoss(0.5), losses.SMARTLoss()])
def test_attacks_on_logits_need_no_labels(attack):
    fed = step(target=None)
    term = AdversarialTraining(attack, closure="logits", when="always").term(fed)
    assert term > 0
    term.backward()
    assert fed.model.head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("attack", [losses.FreeLB(), losses.PGD(random_start=True), losses.FGM()])
def test_random_numbers_are_those_of_the_step_and_disturb_no_others(attack):
    feedback = AdversarialTraining(attack, when="always")
    terms, states = [], []
    for seed, global_seed in ((1, 1), (1, 2), (2, 1)):
        fed = step(seed=seed, dropout=0.5)
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        terms.append(feedback.term(fed).detach())
        states.append(torch.equal(before, torch.get_rng_state()))
    assert all(states)
    assert torch.equal(terms[0], terms[1])
    assert not torch.equal(terms[0], terms[2])


def test_waits_for_reliance_is_held_and_withdrawn():
    feedback, fed = AdversarialTraining(losses.FGM(), coefficient=0.5), step()
    assert feedback.term(fed) is None
    assert not feedback.apply(report(finding(where="names"), finding("attention", "spurious")))
    feedback.hold(True)
    (action,) = feedback.apply(report(finding()))
    assert str(action).startswith("adversarial training switched on with coefficient 0.5 (")
    assert (action.old, action.new, action.finding) == (0.0, 0.5, ("feature", "spurious"))
    assert feedback.term(fed) is None
    feedback.hold(False)
    assert feedback.term(fed) > 0
    resumed = AdversarialTraining(losses.FGM())
    resumed.load_state_dict(saved(feedback.state_dict()))
    assert resumed.active
    assert pickle.loads(pickle.dumps(resumed)).active
    feedback.withdraw()
    assert feedback.term(fed) is None


def test_without_a_region_no_finding_speaks_of_it():
    feedback = AdversarialTraining(losses.FGM(), region=None, when="always")
    assert feedback.answered(report(finding())) == ()
    assert not feedback.apply(report(finding()))


def test_missing_labels_are_refused():
    with pytest.raises(ValueError, match="needs the label of each sample, got none"):
        AdversarialTraining(losses.FGM(), when="always").term(step(target=None))


def test_attack_without_a_scalar_is_refused():
    feedback = AdversarialTraining(losses.VirtualAdversarialLoss(reduction="none"), closure="logits", when="always")
    with pytest.raises(ValueError, match=r"`attack` must return a scalar, got shape \(3,\)"):
        feedback.term(step())


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (TypeError, {"attack": print}, "`attack` must be a module such as `losses.FGM"),
        (ValueError, {"attack": nn.Linear(2, 2)}, "must have no learnable parameters"),
        (TypeError, {"loss": "cross entropy"}, "`loss` must be called with logits and target"),
        (ValueError, {"coefficient": 0}, "`coefficient` must be above 0 and finite, got 0"),
        (ValueError, {"coefficient": float("inf")}, "`coefficient` must be above 0 and finite, got inf"),
        (ValueError, {"closure": "gradient"}, "`closure` must be one of 'loss', 'logits'"),
        (ValueError, {"region": None}, "`region=None` needs when='always'"),
    ],
)
def test_wrong_arguments_are_refused(error, arguments, message):
    with pytest.raises(error, match=message):
        AdversarialTraining(**{"attack": losses.FGM(), **arguments})
