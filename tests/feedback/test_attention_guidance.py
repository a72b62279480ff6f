"""Attention guidance: the term it adds, when it acts, what it refuses."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import weakref

import pytest
import torch
from torch import nn

from attn_callbacks.bias import AttentionShare, BiasReport
from attn_callbacks.capture import AttentionCall
from attn_callbacks.feedback import AttentionGuidance
from losses import AttentionGuidedLoss

RELEVANCE = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0]])
SPURIOUS = torch.tensor([[0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
VALID = torch.tensor([[True, True, True, False], [True, True, True, True]])


def call(name="layer", queries=4, keys=4, batch=2, grad=True, **arguments):
    generator = torch.Generator().manual_seed(len(name))
    query = torch.randn(batch, 2, queries, 8, generator=generator, requires_grad=grad)
    return AttentionCall(name, query=query, key=torch.randn(batch, 2, keys, 8, generator=generator), **arguments)


def report(counts, **arguments):
    groups = {"group_names": ("Amazon", "Tweets")} if len(counts) > 1 else {}
    return BiasReport(0, 0, torch.tensor(counts), ("negative", "positive"), **groups, **arguments)


FAIR = report([[[80, 20], [20, 80]]])
CLASS_BIAS = report([[[95, 5], [40, 60]]])
GROUP_BIAS = report([[[95, 5], [5, 95]], [[60, 40], [40, 60]]])
ATTENTION_BIAS = report(
    [[[80, 20], [20, 80]]],
    attention={"spurious": AttentionShare(torch.tensor([0.5, 0.1]), torch.tensor([5.0, 1.0]), torch.tensor([99, 99]))},
)


def test_term_is_the_coefficient_times_the_loss_of_all_layers():
    calls, loss = [call("first"), call("second")], AttentionGuidedLoss()
    term = AttentionGuidance(loss, coefficient=3.0).loss_term(calls, RELEVANCE, SPURIOUS, VALID)
    expected = 3.0 * loss([each.weights() for each in calls], RELEVANCE, VALID, spurious=SPURIOUS)
    torch.testing.assert_close(term, expected)
    term.backward()
    assert all(each.query.grad.abs().sum() > 0 for each in calls)


def test_mass_by_hand():
    tokens = torch.zeros(2, 2, 4, 8, requires_grad=True)
    uniform = AttentionCall("uniform", query=tokens, key=tokens)
    guidance = AttentionGuidance(AttentionGuidedLoss())
    # a quarter and a half of the attention on relevant tokens; a quarter on spurious ones
    assert float(guidance.loss_term([uniform], RELEVANCE, None, None).detach()) == pytest.approx((0.75 + 0.5) / 2)
    assert float(guidance.loss_term([uniform], None, SPURIOUS, None).detach()) == pytest.approx(0.25)


def test_only_self_attention_over_the_annotated_tokens_counts():
    own = call("own")
    others = [call("cross", is_cross=True), call("pooled", queries=2, keys=2), call("windows", batch=8)]
    guidance = AttentionGuidance(AttentionGuidedLoss())
    alone = guidance.loss_term([own], RELEVANCE, None, VALID)
    assert torch.equal(guidance.loss_term([*others, own], RELEVANCE, None, VALID), alone)


def test_only_calls_with_a_graph_count():
    own, frozen = call("own"), call("frozen", grad=False)
    guidance = AttentionGuidance(AttentionGuidedLoss())
    alone = guidance.loss_term([own], RELEVANCE, None, VALID)
    assert torch.equal(guidance.loss_term([frozen, own], RELEVANCE, None, VALID), alone)


def test_without_gradients_the_number_can_still_be_read():
    guidance, own = AttentionGuidance(AttentionGuidedLoss()), call("own")
    with torch.no_grad():
        assert guidance.loss_term([own], RELEVANCE, None, VALID) == guidance.loss_term([own], RELEVANCE, None, VALID)


def test_no_annotation_no_term():
    assert AttentionGuidance(AttentionGuidedLoss()).loss_term([call()], None, None, VALID) is None


def test_rows_without_any_allowed_key_stay_finite():
    mask = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    mask[0] = False
    own = call("own", mask=mask)
    term = AttentionGuidance(AttentionGuidedLoss(form="log")).loss_term([own], RELEVANCE, SPURIOUS, VALID)
    term.backward()
    assert bool(term.isfinite())
    assert bool(own.query.grad.isfinite().all())


def test_nothing_trainable_is_refused():
    with pytest.raises(
        RuntimeError, match=r"'frozen': none of the 2 calls carries a gradient. Unfreeze .*use_reentrant"
    ):
        AttentionGuidance(AttentionGuidedLoss()).loss_term(
            [call("frozen", grad=False), call("frozen", grad=False)], RELEVANCE, None, VALID
        )


def test_reentrant_checkpointing_is_refused():
    """Its forward runs without gradients, so what was captured cannot train anything."""
    with torch.no_grad():
        tokens = torch.zeros(2, 2, 4, 8, requires_grad=True) * 1
        captured = AttentionCall("layer", query=tokens, key=tokens)
    with pytest.raises(RuntimeError, match="non-reentrant"):
        AttentionGuidance(AttentionGuidedLoss()).loss_term([captured], RELEVANCE, None, VALID)


@pytest.mark.parametrize(
    ("calls", "seen"),
    [([call(queries=5, keys=5)], r"\[\(2, 5\)\]"), ([call(is_cross=True)], "none"), ([], "none")],
)
def test_annotation_of_other_tokens_is_refused(calls, seen):
    with pytest.raises(
        RuntimeError, match=rf"no self-attention over \(batch, keys\) = \(2, 4\); seen: {seen}. Annotate"
    ):
        AttentionGuidance(AttentionGuidedLoss()).loss_term(calls, RELEVANCE, None, VALID)


def test_always_acts_from_the_start():
    guidance = AttentionGuidance(AttentionGuidedLoss())
    assert guidance.active
    assert guidance.apply(GROUP_BIAS) == ()
    guidance.load_state_dict({"active": False})  # saved by a run with when="biased"
    assert guidance.active


@pytest.mark.parametrize("found", [GROUP_BIAS, ATTENTION_BIAS])
def test_biased_waits_for_a_finding_it_answers(found):
    guidance = AttentionGuidance(AttentionGuidedLoss(), 0.5, when="biased")
    assert guidance.loss_term([call()], RELEVANCE, None, VALID) is None
    assert CLASS_BIAS.findings
    for harmless in (FAIR, CLASS_BIAS):
        assert guidance.apply(harmless) == ()
        assert not guidance.active
    (sentence,) = guidance.apply(found)
    assert sentence.startswith("attention guidance switched on with coefficient 0.5 (")
    assert guidance.answered(found)[0].text[:-1] in sentence
    assert guidance.loss_term([call()], RELEVANCE, None, VALID) > 0


def test_it_stays_on_and_says_so_once():
    guidance = AttentionGuidance(AttentionGuidedLoss(), when="biased")
    assert len(guidance.apply(GROUP_BIAS)) == 1
    assert guidance.apply(GROUP_BIAS) == ()
    assert guidance.apply(FAIR) == ()
    assert guidance.active


def test_state_survives_a_checkpoint():
    guidance = AttentionGuidance(AttentionGuidedLoss(), when="biased")
    for expected in (False, True):
        file = io.BytesIO()
        torch.save(guidance.state_dict(), file)
        file.seek(0)
        resumed = AttentionGuidance(AttentionGuidedLoss(), when="biased")
        resumed.load_state_dict(torch.load(file, weights_only=True))
        resumed.load_state_dict({})
        assert resumed.active is expected
        assert resumed.state_dict() == guidance.state_dict()
        guidance.apply(GROUP_BIAS)


def test_another_module_waits_for_a_finding_of_its_own():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    guidance = AttentionGuidance(AttentionGuidedLoss(), when="biased")
    guidance.bind(first)
    guidance.apply(GROUP_BIAS)
    guidance.bind(first)
    assert guidance.active  # the same run goes on
    guidance.bind(second)
    assert not guidance.active
    assert len(guidance.apply(GROUP_BIAS)) == 1


def test_module_is_let_go_after_its_run_and_the_next_waits():
    module = nn.Linear(2, 2)
    guidance, reference = AttentionGuidance(AttentionGuidedLoss(), when="biased"), weakref.ref(module)
    guidance.bind(module)
    guidance.apply(GROUP_BIAS)
    del module
    gc.collect()
    assert reference() is None
    guidance.bind(nn.Linear(2, 2))
    assert not guidance.active


def test_always_acts_in_every_module():
    guidance = AttentionGuidance(AttentionGuidedLoss())
    for module in (nn.Linear(2, 2), nn.Linear(2, 2)):
        guidance.bind(module)
        assert guidance.active


@pytest.mark.parametrize("order", ["load, bind", "bind, load", "other run, bind, load"])
def test_restored_state_wins_over_binding(order):
    last, module = nn.Linear(2, 2), nn.Linear(2, 2)
    guidance = AttentionGuidance(AttentionGuidedLoss(), when="biased")
    for action in order.split(", "):
        if action == "load":
            guidance.load_state_dict({"active": True})
        else:
            guidance.bind(module if action == "bind" else last)
    assert guidance.active


@pytest.mark.parametrize("twin", [copy.copy, copy.deepcopy, lambda guidance: pickle.loads(pickle.dumps(guidance))])
def test_copy_lets_go_of_the_module_and_keeps_the_state(twin):
    module, other = nn.Linear(2, 2), nn.Linear(2, 2)
    guidance = AttentionGuidance(AttentionGuidedLoss(), when="biased")
    guidance.bind(module)
    guidance.apply(GROUP_BIAS)
    copied = twin(guidance)
    copied.bind(other)
    assert copied.active
    guidance.bind(module)
    assert guidance.active


def test_binds_to_any_module_and_can_be_pickled():
    guidance = AttentionGuidance(AttentionGuidedLoss(), layers=["encoder.*"])
    guidance.bind(nn.Linear(2, 2))
    assert guidance.layers == ("encoder.*",)
    twin = pickle.loads(pickle.dumps(guidance))
    assert repr(twin) == repr(guidance)
    assert "AttentionGuidedLoss(form='mass'" in repr(guidance)


def test_loss_that_is_not_a_scalar_is_refused():
    with pytest.raises(ValueError, match=r"`loss` must return a scalar, got shape \(2,\). Use reduction='mean'"):
        AttentionGuidance(AttentionGuidedLoss(reduction="none")).loss_term([call()], RELEVANCE, None, VALID)


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (TypeError, {"loss": print}, "`loss` must be a module such as `losses.AttentionGuidedLoss"),
        (ValueError, {"loss": nn.Linear(2, 2)}, "must have no learnable parameters, got Linear with some"),
        (ValueError, {"coefficient": math.nan}, "`coefficient` must be finite and not negative, got nan"),
        (ValueError, {"coefficient": math.inf}, "`coefficient` must be finite"),
        (ValueError, {"coefficient": -1.0}, "not negative, got -1.0"),
        (TypeError, {"coefficient": "a"}, "`coefficient` must be a number, got 'a'"),
        (TypeError, {"coefficient": None}, "`coefficient` must be a number, got None"),
        (ValueError, {"when": "later"}, "`when` must be one of 'always', 'biased', got 'later'"),
        (TypeError, {"layers": "encoder"}, r"`layers` must be a list of names, got 'encoder': pass \['encoder'\]"),
    ],
)
def test_wrong_arguments_are_refused(error, arguments, message):
    with pytest.raises(error, match=message):
        AttentionGuidance(**{"loss": AttentionGuidedLoss(), **arguments})
