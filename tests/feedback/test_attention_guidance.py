"""Attention guidance: the term it adds, when it acts, how strong, what it refuses."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref

import pytest
import torch
from torch import nn

from attn_callbacks.bias import AttentionShare, BiasReport, Candidate
from attn_callbacks.bias.reliance import Reliance
from attn_callbacks.capture import AttentionCall
from attn_callbacks.feedback.attention_guidance import AttentionGuidance
from attn_callbacks.feedback.attention_term import attention_term
from attn_callbacks.feedback.automatic import automatic_feedback
from attn_callbacks.feedback.random_rationale import RandomRationaleControl
from losses import AttentionGuidedLoss
from tests.feedback.checkpoint import saved
from tests.feedback.guided_steps import Step, call

RELEVANCE = torch.tensor([[True, False, False, False], [False, True, True, False]])
SPURIOUS = torch.tensor([[False, False, True, False], [False, False, False, True]])
VALID = torch.tensor([[True, True, True, False], [True, True, True, True]])


MARKED = Step(relevance=RELEVANCE, spurious=SPURIOUS, valid=VALID)


def report(counts=(((80, 20), (20, 80)),), lost=None, **arguments):
    groups = {"group_names": ("Amazon", "Tweets")} if len(counts) > 1 else {}
    if lost is not None:
        outcomes = torch.tensor([[[20, 0], [lost, 80 - lost]], [[20, 0], [0, 80]]])
        arguments["reliance"] = {"spurious": Reliance(outcomes)}
    return BiasReport(0, 0, torch.tensor(counts), ("negative", "positive"), **groups, **arguments)


FAIR = report()
CLASS_BIAS = report((((95, 5), (40, 60)),))
GROUP_BIAS = report((((95, 5), (5, 95)), ((60, 40), (40, 60))))
ATTENTION_BIAS = report(
    attention={"spurious": AttentionShare(torch.tensor([0.5, 0.1]), torch.tensor([5.0, 1.0]), torch.tensor([99, 99]))}
)
RELIANT, FREE = report(lost=40), report(lost=0)
FALLEN = report((((80, 20), (80, 20)),))


def test_term_is_the_coefficient_times_the_exact_mass_term():
    step = Step([call("first"), call("second")], RELEVANCE, SPURIOUS, VALID)
    term = AttentionGuidance(coefficient=3.0, scale_free=False).term(step)
    torch.testing.assert_close(term, 3 * attention_term(step.calls, RELEVANCE, SPURIOUS, VALID))
    term.backward()
    assert all(each.query.grad.abs().sum() > 0 for each in step.calls)


def test_heads_and_queries_are_passed_on():
    term = AttentionGuidance(heads=[1], queries="first", scale_free=False).term(MARKED)
    chosen = attention_term(MARKED.calls, RELEVANCE, SPURIOUS, VALID, heads=[1], queries="first")
    torch.testing.assert_close(term, chosen)
    assert term != AttentionGuidance(queries="first", scale_free=False).term(MARKED)


def test_loss_of_ones_own_gets_the_weights_of_all_layers():
    step, loss = Step([call("first"), call("second")], RELEVANCE, SPURIOUS, VALID), AttentionGuidedLoss()
    weights = [each.weights() for each in step.calls]
    term = AttentionGuidance(loss, 3.0).term(step)
    torch.testing.assert_close(term, 3 * loss(weights, RELEVANCE, VALID, spurious=SPURIOUS))
    term = AttentionGuidance(loss, heads=[1]).term(step)
    torch.testing.assert_close(term, loss([w[:, 1:] for w in weights], RELEVANCE, VALID, spurious=SPURIOUS))


@pytest.mark.parametrize("loss", [None, AttentionGuidedLoss()])
def test_one_annotation_is_enough_and_none_is_no_term(loss):
    guidance = AttentionGuidance(loss)
    assert guidance.term(Step(relevance=RELEVANCE)) > 0
    assert guidance.term(Step(spurious=SPURIOUS)) > 0
    assert guidance.term(Step(valid=VALID)) is None


@pytest.mark.parametrize("loss", [None, AttentionGuidedLoss()])
def test_only_self_attention_over_the_annotated_tokens_with_a_graph_counts(loss):
    own = call("own")
    others = [call("cross", is_cross=True), call("pooled", queries=2, keys=2), call("frozen", grad=False)]
    guidance = AttentionGuidance(loss)
    alone = guidance.term(Step([own], RELEVANCE, SPURIOUS, VALID))
    assert torch.equal(guidance.term(Step([*others, own], RELEVANCE, SPURIOUS, VALID)), alone)
    with pytest.raises(RuntimeError, match="no self-attention over"):
        guidance.term(Step(others[:2], RELEVANCE))
    with pytest.raises(RuntimeError, match="carries a gradient"):
        guidance.term(Step([call("frozen", grad=False)], RELEVANCE))


def test_reentrant_checkpointing_is_refused():
    """Its forward runs without gradients, so what was captured cannot train anything."""
    with torch.no_grad():
        tokens = torch.zeros(2, 2, 4, 8, requires_grad=True) * 1
        captured = AttentionCall("layer", query=tokens, key=tokens)
    with pytest.raises(RuntimeError, match="non-reentrant"):
        AttentionGuidance().term(Step([captured], RELEVANCE))


def test_built_in_term_asks_for_no_weights(monkeypatch):
    monkeypatch.setattr(AttentionCall, "weights", lambda *_: pytest.fail("weights were asked for"))
    assert AttentionGuidance().term(MARKED) > 0


def test_warm_up_grows_from_nothing_step_by_step():
    guidance, whole = AttentionGuidance(warm_up=4), AttentionGuidance().term(MARKED)
    shares = [float(guidance.term(MARKED).detach() / whole.detach()) for _ in range(5)]
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    guidance = AttentionGuidance(warm_up=2)
    guidance.term(Step())  # without annotation, as another process may have some
    torch.testing.assert_close(guidance.term(MARKED), whole)


def test_scale_free_term_has_the_size_of_the_loss():
    guidance = AttentionGuidance(coefficient=0.5)
    step = Step(relevance=RELEVANCE, loss=torch.tensor(3.0, requires_grad=True))
    assert float(guidance.term(step).detach()) == pytest.approx(1.5)
    step.loss = torch.tensor(30.0)
    assert float(guidance.term(step).detach()) == pytest.approx(0.5 * (0.99 * 3 + 0.01 * 30))
    unmarked = Step(relevance=torch.zeros_like(RELEVANCE), loss=torch.tensor(3.0))
    before = guidance.state_dict()["averages"][1]
    assert guidance.term(unmarked) == 0
    assert guidance.state_dict()["averages"][1] == before
    assert guidance.term(Step(loss=torch.tensor(300.0))) is None
    assert guidance.state_dict()["averages"][0] > 6


def test_a_loss_of_ones_own_has_its_own_scale_unless_asked():
    step, loss = Step(relevance=RELEVANCE, loss=torch.tensor(30.0)), AttentionGuidedLoss()
    assert AttentionGuidance(loss).term(step) < 1
    assert float(AttentionGuidance(loss, scale_free=True).term(step).detach()) == pytest.approx(30)


def test_padding_that_is_marked_is_no_annotation():
    guidance = AttentionGuidance(scale_free=True)
    guidance.term(Step(relevance=~VALID, valid=VALID))
    assert guidance.state_dict()["averages"][1].isnan()


def test_strength_is_raised_while_reliance_stays():
    guidance = AttentionGuidance(coefficient=2.0)
    before = guidance.term(MARKED)
    (action,) = guidance.apply(RELIANT)
    text = f"attention guidance: strength 2 -> 3 ({RELIANT.findings[0].text.rstrip('.')})"
    assert (action.text, action.old, action.new) == (text, 2.0, 3.0)
    assert guidance.strength == 3.0
    torch.testing.assert_close(guidance.term(MARKED), 1.5 * before)
    assert guidance.apply(RELIANT) == ()  # rests
    assert guidance.apply(RELIANT)[0].new == 4.5
    assert guidance.apply(FREE) == guidance.apply(FREE) == ()


def test_strength_is_raised_for_a_finding_of_attention_where_reliance_was_not_measured():
    guidance = AttentionGuidance()
    (action,) = guidance.apply(ATTENTION_BIAS)
    assert (action.finding, action.new) == (ATTENTION_BIAS.findings[0].key, 1.5)
    assert action.finding[0] == "attention"
    assert guidance.apply(GROUP_BIAS) == ()


def test_strength_is_lowered_when_accuracy_falls():
    guidance = AttentionGuidance()
    guidance.term(MARKED)
    assert guidance.apply(FAIR) == ()
    (action,) = guidance.apply(FALLEN)
    assert action.text == "attention guidance: strength 1 -> 0.5 (accuracy 0.50, before 0.80)"
    assert (action.finding, action.old, action.new) == (None, 1.0, 0.5)


def test_strength_of_guidance_that_took_no_part_is_not_lowered():
    fresh, held = AttentionGuidance(), AttentionGuidance()
    held.term(MARKED)
    held.hold(True)
    for guidance in (fresh, held):
        assert guidance.apply(FAIR) == guidance.apply(FALLEN) == ()
        assert guidance.strength == 1.0
    held.hold(False)
    assert held.apply(FALLEN)[0].new == 0.5


def test_bounds_of_strength_are_its_own():
    guidance = AttentionGuidance(raise_by=4.0, limit=2.0)
    assert guidance.apply(RELIANT)[0].new == 2.0
    tolerant = AttentionGuidance(tolerance=0.4)
    tolerant.term(MARKED)
    tolerant.apply(FAIR)
    assert tolerant.apply(FALLEN) == ()


def test_without_control_the_strength_stays():
    guidance = AttentionGuidance(control=False, scale_free=False)
    for each in (RELIANT, ATTENTION_BIAS, FAIR, FALLEN):
        assert guidance.apply(each) == ()
    torch.testing.assert_close(guidance.term(MARKED), attention_term(MARKED.calls, RELEVANCE, SPURIOUS, VALID))


def test_strength_waits_for_the_warm_up():
    guidance = AttentionGuidance(warm_up=2)
    assert guidance.apply(RELIANT) == ()
    for _ in range(2):
        guidance.term(MARKED)
    assert guidance.apply(RELIANT)[0].new == 1.5


def test_always_acts_from_the_start():
    guidance = AttentionGuidance()
    assert guidance.active
    guidance.load_state_dict({"active": False})  # saved by a run with when="biased"
    assert guidance.active


@pytest.mark.parametrize("found", [GROUP_BIAS, ATTENTION_BIAS, RELIANT])
def test_biased_waits_for_a_finding_it_answers(found):
    guidance = AttentionGuidance(coefficient=0.5, when="biased")
    assert guidance.term(MARKED) is None
    assert CLASS_BIAS.findings
    for harmless in (FAIR, CLASS_BIAS):
        assert guidance.apply(harmless) == ()
        assert not guidance.active
    (action,) = guidance.apply(found)
    cause = guidance.answered(found)[0]
    assert action.text == f"attention guidance switched on with strength 0.5 ({cause.text.rstrip('.')})"
    assert (action.finding, action.old, action.new) == (cause.key, 0.0, 0.5)
    assert guidance.term(MARKED) > 0
    assert guidance.strength == 0.5  # it has not yet been tried
    guidance.apply(FAIR)
    assert guidance.active


def elsewhere(**arguments):
    """A report of reliance on hashtags, which guidance knows nothing about."""
    outcomes = Reliance(torch.tensor([[[20, 0], [40, 40]], [[20, 0], [0, 80]]]))
    return report(reliance={"hashtags": outcomes}, **arguments)


def test_neither_candidates_nor_other_sets_switch_it_on():
    tied = report(candidates=(Candidate("token 'film'", 3.0, 1e-6, 0.6, 0.2, 90),))
    control = RandomRationaleControl(AttentionGuidance(when="biased"))
    assert control.when == "biased"
    assert RandomRationaleControl(AttentionGuidance()).when == "always"
    for harmless in (tied, elsewhere()):
        assert [finding.kind for finding in harmless.findings] == ["feature"]
        for guidance in (AttentionGuidance(when="biased"), control):
            assert guidance.answered(harmless) == ()
            assert guidance.apply(harmless) == ()
            assert not guidance.active
    assert [each.where for each in control.answered(RELIANT)] == ["spurious"]


def test_held_back_it_decides_and_adds_nothing():
    guidance = AttentionGuidance(when="biased", warm_up=10)
    guidance.hold(True)
    assert guidance.apply(RELIANT)[0].new == 1.0
    assert guidance.apply(RELIANT)[0].new == 1.5
    assert not guidance.active
    assert guidance.term(MARKED) is None
    guidance.hold(False)
    assert guidance.active


def test_withdrawn_for_good():
    guidance = AttentionGuidance()
    guidance.withdraw()
    assert guidance.term(MARKED) is None
    resumed = AttentionGuidance()
    resumed.load_state_dict(saved(guidance.state_dict()))
    assert not resumed.active


def test_resumed_run_goes_on_to_the_last_bit():
    def run(guidance, start, stop):
        terms = []
        for number in range(start, stop):
            for part in range(3):
                loss = torch.tensor(1.0 + 0.1 * number + 0.01 * part)
                extra = guidance.term(Step([call("x" * (number + part + 1))], RELEVANCE, SPURIOUS, VALID, loss))
                terms.append(None if extra is None else extra.detach())
            guidance.apply([FAIR, RELIANT, RELIANT, RELIANT, FALLEN, RELIANT, RELIANT, RELIANT][number])
        return terms

    def fresh():
        return AttentionGuidance(coefficient=0.3, when="biased", scale_free=True, warm_up=8)

    whole, first, resumed = fresh(), fresh(), fresh()
    expected = run(whole, 0, 8)
    for cut in range(8):
        first, resumed = fresh(), fresh()
        found = run(first, 0, cut)
        resumed.load_state_dict(saved(first.state_dict()))
        found += run(resumed, cut, 8)
        assert [None if x is None else x.item() for x in found] == [None if x is None else x.item() for x in expected]
        assert resumed.strength == whole.strength
    assert whole.strength not in (0.3, 0.45)
    resumed.load_state_dict({})
    assert str(resumed.state_dict()) == str(whole.state_dict())


def test_another_module_starts_anew():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    guidance = AttentionGuidance(when="biased", scale_free=True)
    guidance.bind(first)
    new = str(guidance.state_dict())
    for each in (GROUP_BIAS, RELIANT):
        guidance.apply(each)
    guidance.term(MARKED)
    guidance.bind(first)
    assert (guidance.active, guidance.strength) == (True, 1.5)  # the same run goes on
    guidance.bind(second)
    assert str(guidance.state_dict()) == new


def test_module_is_let_go_after_its_run_and_the_next_waits():
    module = nn.Linear(2, 2)
    guidance, reference = AttentionGuidance(when="biased"), weakref.ref(module)
    guidance.bind(module)
    guidance.apply(GROUP_BIAS)
    del module
    gc.collect()
    assert reference() is None
    guidance.bind(nn.Linear(2, 2))
    assert not guidance.active


@pytest.mark.parametrize("order", ["load, bind", "bind, load", "other run, bind, load"])
def test_restored_state_wins_over_binding(order):
    last, module = nn.Linear(2, 2), nn.Linear(2, 2)
    guidance = AttentionGuidance(when="biased")
    for action in order.split(", "):
        if action == "load":
            guidance.load_state_dict({"active": True, "factor": 2.25})
        else:
            guidance.bind(module if action == "bind" else last)
    assert (guidance.active, guidance.strength) == (True, 2.25)


@pytest.mark.parametrize("twin", [copy.copy, copy.deepcopy, lambda guidance: pickle.loads(pickle.dumps(guidance))])
def test_copy_lets_go_of_the_module_and_keeps_the_state(twin):
    module, other = nn.Linear(2, 2), nn.Linear(2, 2)
    guidance = AttentionGuidance(when="biased")
    guidance.bind(module)
    guidance.apply(GROUP_BIAS)
    copied = twin(guidance)
    copied.bind(other)
    assert copied.active
    guidance.bind(module)
    assert guidance.active


def test_repr_builds_it_again():
    guidance = AttentionGuidance(
        None, 2.0, layers=["encoder.*"], heads=[1], queries="first", when="biased", control=False, scale_free=False,
        warm_up=5, raise_by=2.0, limit=4.0, tolerance=0.1,
    )  # fmt: skip
    assert repr(eval(repr(guidance))) == repr(guidance)
    assert repr(guidance) != repr(AttentionGuidance())
    assert "AttentionGuidedLoss(form='mass'" in repr(AttentionGuidance(AttentionGuidedLoss()))


def test_loss_that_is_not_a_scalar_is_refused():
    with pytest.raises(ValueError, match=r"`loss` must return a scalar, got shape \(2,\). Use reduction='mean'"):
        AttentionGuidance(AttentionGuidedLoss(reduction="none")).term(MARKED)


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (TypeError, {"loss": print}, "`loss` must be a module such as `losses.AttentionGuidedLoss"),
        (ValueError, {"loss": nn.Linear(2, 2)}, "must have no learnable parameters, got Linear with some"),
        (ValueError, {"loss": AttentionGuidedLoss(), "queries": "first"}, "queries='first' is for the built-in term"),
        (ValueError, {"coefficient": math.nan}, "`coefficient` must be finite and not negative, got nan"),
        (ValueError, {"coefficient": math.inf}, "`coefficient` must be finite"),
        (ValueError, {"coefficient": -1.0}, "not negative, got -1.0"),
        (TypeError, {"coefficient": "a"}, "`coefficient` must be a number, got 'a'"),
        (ValueError, {"when": "later"}, "`when` must be one of 'always', 'biased', 'unmeasured', got 'later'"),
        (ValueError, {"queries": "last"}, "`queries` must be one of 'all', 'first', got 'last'"),
        (TypeError, {"layers": "encoder"}, r"`layers` must be a list of names, got 'encoder'. Pass \['encoder'\]"),
        (TypeError, {"heads": [0.5]}, "`heads` must be an integer, got 0.5"),
        (ValueError, {"warm_up": -1}, "`warm_up` must be at least 0"),
        (ValueError, {"raise_by": 0.5}, "`raise_by` must be at least 1"),
    ],
)
def test_wrong_arguments_are_refused(error, arguments, message):
    with pytest.raises(error, match=message):
        AttentionGuidance(**arguments)


def test_unmeasured_leaves_reliance_to_counter_examples():
    (guidance,) = [each for each in automatic_feedback(nn.Module()) if isinstance(each, AttentionGuidance)]
    assert guidance.when == "unmeasured"
    biased, seen = (((95, 5), (5, 95)), ((60, 40), (40, 60))), ATTENTION_BIAS.attention
    for lost in (0, 40):
        guidance.apply(report(biased, lost=lost, attention=seen))
        assert not guidance.active
    guidance.apply(report(biased))  # validation has no marks
    assert not guidance.active
    guidance.apply(report(biased, attention=seen))
    assert guidance.active
