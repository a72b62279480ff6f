"""How strength moves: what a report says, one step by hand, running averages, what must always hold."""

from __future__ import annotations

import io
import math
import re
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_callbacks.bias import AttentionShare, BiasReport
from attn_callbacks.bias.reliance import Reliance
from attn_callbacks.feedback._accuracy_level import AccuracyLevel
from attn_callbacks.feedback.strength import (
    Evidence,
    StrengthSettings,
    StrengthState,
    evidence,
    ramp,
    strength_step,
)

PLAIN = StrengthSettings()
LEANING = {"spurious": AttentionShare(torch.tensor([0.5, 0.1]), torch.tensor([5.0, 1.0]), torch.tensor([99, 99]))}


def report(counts=(((80, 20), (20, 80)),), **arguments):
    groups = {"group_names": ("Amazon", "Tweets")} if len(counts) > 1 else {}
    return BiasReport(0, 0, torch.tensor(counts), ("negative", "positive"), **groups, **arguments)


def reliance(lost, gained=0, kept=100):
    """Outcomes before and after for two classes; the first loses samples."""
    return {"spurious": Reliance(torch.tensor([[[10, gained], [lost, kept]], [[10, 0], [0, kept]]]))}


def seen(accuracy=0.9, reason=None, error=0.001, measure="accuracy"):
    return Evidence({measure: (accuracy, error)}, reason)


def walk(*evidences, state=None, chosen=PLAIN):
    states = [StrengthState() if state is None else state]
    for each in evidences:
        states.append(strength_step(states[-1], each, chosen))
    return states


def factors(*evidences, **arguments):
    return [state.factor for state in walk(*evidences, **arguments)[1:]]


def test_raised_every_other_report_while_more_is_wanted():
    wanted = seen(reason="reliance")
    assert factors(wanted, wanted, wanted, wanted, seen(), seen()) == [1.5, 1.5, 2.25, 2.25, 2.25, 2.25]


def test_lowered_when_accuracy_falls_and_nothing_is_wanted():
    fallen = seen(0.85)
    assert factors(seen(), fallen, fallen, fallen, seen(0.9)) == [1.0, 0.5, 0.5, 0.25, 0.25]


def test_never_lowered_while_more_is_wanted():
    """On balanced data, a shortcut that is being learned takes from accuracy with and without spurious tokens."""

    def learned(without, with_them, reason="reliance"):
        return Evidence({"without": (without, 0.001), "with": (with_them, 0.001)}, reason)

    growing = [learned(0.9, 0.92), learned(0.8, 0.85), learned(0.7, 0.8), learned(0.6, 0.75), learned(0.55, 0.7)]
    assert factors(*growing) == [1.5, 1.5, 2.25, 2.25, 3.375]
    assert factors(*growing, learned(0.55, 0.7, None), learned(0.55, 0.7, None))[-1] == 3.375 / 2


def test_guidance_that_never_acted_is_not_lowered():
    state = walk(seen(0.9))[-1]
    idle = strength_step(state, seen(0.5), PLAIN, acted=False)
    assert (idle.factor, idle.resting) == (1.0, False)
    assert strength_step(state, seen(0.5), PLAIN).factor == 0.5
    assert strength_step(state, seen(0.5, "reliance"), PLAIN, acted=False).factor == 1.5


def test_the_running_mean_counts_not_the_last():
    assert factors(seen(0.9), seen(0.885), seen(0.875), seen(0.865)) == [1.0, 1.0, 1.0, 0.5]
    assert factors(seen(0.85), seen(0.95), seen(0.85)) == [1.0, 1.0, 0.5]


def test_a_fall_within_tolerance_or_two_standard_errors_is_none():
    assert factors(seen(0.9), seen(0.881)) == [1.0, 1.0]
    assert factors(seen(0.9), seen(0.87), chosen=StrengthSettings(tolerance=0.05)) == [1.0, 1.0]
    error = 0.03 / 2 / math.sqrt(2)
    assert factors(seen(0.9, error=error * 1.01), seen(0.87, error=error * 1.01)) == [1.0, 1.0]
    assert factors(seen(0.9, error=error * 0.99), seen(0.87, error=error * 0.99)) == [1.0, 0.5]


def test_bounds():
    wanted = [seen(reason="reliance")] * 20
    assert factors(*wanted)[-1] == 10.0
    assert factors(seen(), *[seen(0.5)] * 20)[-1] == 0.1
    assert factors(*wanted, chosen=StrengthSettings(raise_by=1.0)) == [1.0] * 20
    assert factors(*wanted, chosen=StrengthSettings(limit=2.0))[-1] == 2.0


def test_at_a_bound_nothing_rests():
    top = StrengthState(factor=10.0, levels={"accuracy": AccuracyLevel(0.9, 0.001, 1)})
    assert factors(seen(reason="reliance"), seen(0.8), state=top) == [10.0, 5.0]


def test_each_measure_has_its_own_level():
    shuffled = seen(0.6, measure="accuracy without spurious tokens")
    assert factors(seen(0.99), shuffled, seen(0.98), shuffled) == [1.0] * 4
    assert factors(seen(0.99), shuffled, seen(0.9)) == [1.0, 1.0, 0.5]


def test_accuracy_fell_only_if_all_of_it_fell():
    def both(without, with_them, reason=None):
        return Evidence({"without": (without, 0.001), "with": (with_them, 0.001)}, reason)

    assert factors(both(0.5, 1.0, "reliance"), both(0.9, 0.9), both(0.9, 0.9)) == [1.5, 1.5, 1.5]  # the shortcut goes
    assert factors(both(0.9, 0.9), both(0.5, 1.0, "reliance")) == [1.0, 1.5]  # it comes back
    assert factors(both(0.9, 0.9), both(0.7, 0.9), both(0.7, 0.8)) == [1.0, 1.0, 0.5]  # the fit is ruined


def test_not_acting_notes_the_accuracy():
    state = strength_step(StrengthState(), seen(0.95, "reliance"), PLAIN, act=False)
    assert (state.factor, state.levels) == (1.0, {"accuracy": (0.95, 0.001, 1)})
    assert factors(seen(0.8), state=state) == [0.5]


def test_accuracy_that_was_not_measured_is_no_level_and_no_fall():
    state = walk(seen(), seen(math.nan, error=math.nan))[-1]
    assert (state.factor, state.levels) == (1.0, {"accuracy": (0.9, 0.001, 1)})
    assert walk(seen(math.nan))[-1].levels == {}


evidences = st.lists(
    st.builds(seen, st.floats(0, 1), st.sampled_from([None, "reliance"]), st.floats(0, 0.1)), max_size=30
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(evidences, st.integers(0, 30))
def test_always_within_bounds_in_single_steps_and_resumable(history, cut):
    states = walk(*history)
    for before, after in pairwise(states):
        assert 0.1 <= after.factor <= 10
        assert 0.5 - 1e-9 <= after.factor / before.factor <= 1.5 + 1e-9
        assert after.factor == before.factor or (after.resting and not before.resting)
    file = io.BytesIO()
    torch.save(states[min(cut, len(history))].to_dict(), file)
    file.seek(0)
    resumed = StrengthState().restored(torch.load(file, weights_only=True))
    assert walk(*history[cut:], state=resumed)[-1] == states[-1]


def test_state_keeps_what_a_saved_one_lacks():
    state = StrengthState(2.0, {"accuracy": AccuracyLevel(0.9, 0.1, 3)}, True)
    assert state.restored({}) == state
    assert state.restored({"factor": 1.0}) == StrengthState(1.0, {"accuracy": AccuracyLevel(0.9, 0.1, 3)}, True)


def test_accuracy_is_read_where_nothing_else_was_measured():
    error = pytest.approx(math.sqrt(161 / 202 * 41 / 202 / 202), rel=1e-5)
    assert evidence(report()) == ({"accuracy": (pytest.approx(0.8), error)}, None)
    assert math.isnan(evidence(report((((0, 0), (0, 0)),))).accuracies["accuracy"][0])


def test_groups_count_alike_whatever_their_size():
    """A shortcut that is right for most samples makes no fall when it goes."""
    ((name, (mean, error)),) = evidence(report((((900, 100), (10, 10)), ((10, 30), (0, 19))))).accuracies.items()
    assert name == "mean recall of classes within groups"
    assert mean == pytest.approx((0.9 + 0.5 + 0.25) / 3)  # of 19 samples nothing is said
    hits = [((p * n + 1) / (n + 2), n + 2) for p, n in ((0.9, 1000), (0.5, 20), (0.25, 40))]
    assert error == pytest.approx(math.sqrt(sum(p * (1 - p) / n for p, n in hits)) / 3)
    assert list(evidence(report((((9, 1), (1, 1)), ((1, 3), (0, 9))))).accuracies) == ["accuracy"]


def test_significant_reliance_asks_for_more():
    accuracies, reason = evidence(report(reliance=reliance(30)))
    assert "rely on spurious tokens" in reason
    assert "the outcome of 0.12" in reason
    without, with_them = accuracies["accuracy without spurious tokens"], accuracies["accuracy with spurious tokens"]
    assert (without[0], with_them[0]) == pytest.approx((200 / 250, 230 / 250))
    assert without[1] == pytest.approx(math.sqrt(201 / 252 * 51 / 252 / 252), rel=1e-5)


@pytest.mark.parametrize("harmless", [reliance(0), reliance(3), reliance(14, 10), reliance(30, kept=5000)])
def test_reliance_within_its_error_or_the_dead_band_does_not(harmless):
    assert evidence(report(reliance=harmless)).reason is None


def test_measured_reliance_overrules_attention():
    assert "spurious tokens" in evidence(report(attention=LEANING)).reason
    assert evidence(report(attention=LEANING, reliance=reliance(0))).reason is None
    assert evidence(report(attention=LEANING, reliance={"names": reliance(30)["spurious"]})).reason is not None
    nothing = {"spurious": Reliance(torch.zeros(2, 2, 2, dtype=torch.int64))}
    assert list(evidence(report(attention=LEANING, reliance=nothing)).accuracies) == ["accuracy"]


def test_class_bias_asks_for_nothing():
    assert report((((95, 5), (40, 60)),)).findings
    assert evidence(report((((95, 5), (40, 60)),))).reason is None


def test_ramp_reaches_one_at_the_last_step_of_the_warm_up():
    assert [ramp(step, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert ramp(0, 0) == ramp(0, 1) == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"raise_by": 0.9}, "`raise_by` must be at least 1 and finite, got 0.9"),
        ({"lower_by": math.inf}, "`lower_by` must be at least 1 and finite, got inf"),
        ({"limit": math.nan}, "`limit` must be at least 1"),
        ({"tolerance": -0.1}, "`tolerance` must lie between 0 and 1"),
        ({"warm_up": -1}, "`warm_up` must be at least 0, got -1"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        StrengthSettings(**changes)


@pytest.mark.parametrize("name", ["raise_by", "lower_by", "limit", "tolerance"])
@pytest.mark.parametrize("value", ["a", None, True])
def test_settings_that_are_no_number_are_refused(name, value):
    with pytest.raises(TypeError, match=rf"`{name}` must be a number, got {re.escape(repr(value))}\."):
        StrengthSettings(**{name: value})
