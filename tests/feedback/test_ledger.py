"""The judge of feedback, and what the ledger keeps of decisions."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from attn_callbacks.bias import BiasReport, Reliance
from attn_callbacks.feedback import Action, Feedback, StepFeedback
from attn_callbacks.feedback.ledger import Ledger

CLASSES = ("good", "bad")


class Still(Feedback):
    answers = frozenset({"class"})

    def apply(self, report: BiasReport) -> Sequence[Action]:
        return []


class Waiting(StepFeedback):
    """Takes part in steps once it is switched on."""

    answers = frozenset({"class"})
    when = "biased"
    on = False

    @property
    def active(self) -> bool:
        return self.acting and self.on

    def apply(self, report: BiasReport) -> Sequence[Action]:
        return []


class Always(Waiting):
    when, on = "always", True


def counted(high: int, low: int, samples: int) -> BiasReport:
    return BiasReport(0, 0, torch.tensor([[[high, samples - high], [samples - low, low]]]), CLASSES)


def drawn(source: np.random.Generator, low: float, samples: int) -> BiasReport:
    return counted(int(source.binomial(samples, 0.9)), int(source.binomial(samples, low)), samples)


def withdrawn(ledger: Ledger, reports: Sequence[BiasReport], feedback: Feedback | None = None) -> int | None:
    """At which report the feedback is withdrawn."""
    feedback = feedback or Still()
    return next((n for n, each in enumerate(reports) if ledger.useless("F", feedback, each) is not None), None)


def share_withdrawn(samples: int, low: Callable[[int], float], validations: int = 11, runs: int = 60) -> float:
    source = np.random.default_rng(samples)
    lows = [low(number) for number in range(validations)]
    lost = [withdrawn(Ledger(10), [drawn(source, each, samples) for each in lows]) is not None for _ in range(runs)]
    return sum(lost) / runs


@pytest.mark.parametrize("samples", [100, 1000])
def test_what_does_nothing_is_mostly_withdrawn(samples: int) -> None:
    assert share_withdrawn(samples, lambda number: 0.75, 16, 40) > 0.6


@pytest.mark.parametrize(("samples", "at_most"), [(100, 0.25), (1000, 0.0)])
def test_what_halves_the_finding_is_kept(samples: int, at_most: float) -> None:
    assert share_withdrawn(samples, lambda number: 0.75 if number == 0 else 0.825, runs=40) <= at_most


def test_what_halves_the_finding_is_kept_in_long_runs() -> None:
    assert share_withdrawn(1000, lambda number: 0.75 if number == 0 else 0.825, 60, 20) < 0.15


LARGE, HALF, FULL = (counted(900, low, 1000) for low in (600, 750, 605))


def test_one_lucky_validation_proves_nothing() -> None:
    assert withdrawn(Ledger(10), [LARGE, HALF, HALF, *[LARGE] * 8]) == 10


def test_only_the_last_half_counts() -> None:
    assert withdrawn(Ledger(10), [LARGE, *[LARGE] * 5, *[HALF] * 5]) is None


def test_the_withdrawal_tells_sizes() -> None:
    ledger, feedback = Ledger(2), Still()
    (*_, said) = (ledger.useless("F", feedback, each) for each in (LARGE, LARGE, FULL))
    assert said is not None
    assert said.text.startswith("withdrawn: in 2 validations the finding it answers did not fall from 0.30")
    assert (said.finding, said.old, said.new) == (("class", "bad"), pytest.approx(0.3), pytest.approx(0.295))


def test_who_proved_itself_is_tried_again_when_the_finding_is_back() -> None:
    proved = [LARGE, *[HALF] * 4]
    assert withdrawn(Ledger(4), [*proved, *[HALF] * 20]) is None
    assert withdrawn(Ledger(4), [*proved, *[LARGE] * 8]) == 12
    assert withdrawn(Ledger(4), [*proved, *[LARGE] * 4, *[HALF] * 12]) is None  # it helped again


def test_a_finding_that_is_gone_ends_the_trial() -> None:
    close = counted(900, 890, 1000)
    assert withdrawn(Ledger(2), [LARGE, LARGE, close, close, close, LARGE]) is None


def reliant(changed: int | None) -> BiasReport:
    known = {} if changed is None else {"spurious": torch.tensor([[[100, 0], [changed, 400 - changed]]] * 2)}
    counts = torch.tensor([[[400, 100], [100, 400]]])
    return BiasReport(0, 0, counts, CLASSES, reliance={name: Reliance(each) for name, each in known.items()})


class Features(Still):
    answers = frozenset({"feature"})


def test_validations_that_did_not_measure_it_do_not_count() -> None:
    reports = [reliant(200), reliant(200), reliant(None), reliant(200), reliant(None), reliant(200)]
    assert withdrawn(Ledger(3), reports, Features()) == 5


def test_a_trial_that_nobody_measures_any_more_ends() -> None:
    reports = [reliant(200), reliant(None), reliant(None), reliant(200), reliant(200)]
    assert withdrawn(Ledger(2), reports, Features()) is None


def test_a_trial_starts_when_the_feedback_acts() -> None:
    assert withdrawn(Ledger(2), [LARGE] * 9, Waiting()) is None
    early, always = Ledger(2), Always()
    assert withdrawn(early, [LARGE] * 9, always) is None  # what it has left says nothing of what it does
    early.add(LARGE, {}, {"F": [Action("stronger", LARGE.findings[0].key)]})
    assert withdrawn(early, [LARGE] * 3, always) == 2
    held = Still()
    held.hold(True)
    assert withdrawn(Ledger(2), [LARGE] * 9, held) is None
    switched, ledger = Waiting(), Ledger(2)
    assert withdrawn(ledger, [LARGE] * 5, switched) is None
    switched.on = True
    assert withdrawn(ledger, [LARGE] * 3, switched) == 2


def test_without_patience_nothing_is_withdrawn() -> None:
    assert withdrawn(Ledger(None), [LARGE] * 30) is None


@pytest.mark.parametrize("at", [1, 3, 6, 9, 11])
def test_a_resumed_trial_goes_on(at: int) -> None:
    reports = [LARGE, *[HALF] * 4, *[LARGE] * 8]
    ledger = Ledger(4)
    assert withdrawn(ledger, reports[:at]) is None
    resumed = Ledger(4)
    resumed.load_state_dict(json.loads(json.dumps(ledger.state_dict())))
    assert withdrawn(resumed, reports[at:]) == 12 - at


def decided(first: BiasReport, second: BiasReport, key: tuple[str, str]) -> dict[str, Any]:
    ledger = Ledger(None)
    ledger.add(first, {}, {"F": [Action("done", key)]})
    ledger.add(second, {}, {})
    return dict(ledger.entries[0]["decisions"][0])


def test_effect_on_what_is_no_finding_any_more_is_what_is_left() -> None:
    close = counted(900, 895, 1000)
    assert not close.findings
    assert decided(LARGE, close, ("class", "bad"))["effect"] == pytest.approx(0.005 - 0.3)
    assert decided(close, LARGE, ("class", "bad"))["effect"] == pytest.approx(0.3 - 0.005)  # none yet


def test_effect_on_what_was_not_measured_is_unknown() -> None:
    decision = decided(reliant(200), reliant(None), ("feature", "spurious"))
    assert decision["finding"]["size"] == pytest.approx(0.4)
    assert decision["effect"] is None
    assert decided(reliant(None), reliant(200), ("feature", "spurious"))["effect"] is None


def test_what_acts_from_the_start_is_told_once() -> None:
    ledger = Ledger(None)
    said = ledger.first_action("F", Always())
    assert [action.text for action in said] == ["on from the start (always)"]
    ledger.add(LARGE, {}, {"F": said})
    assert ledger.first_action("F", Always()) == []
    assert ledger.first_action("G", Waiting()) == []
    assert ledger.first_action("G", Still()) == []


def test_decisions_between_validations_are_with_the_last_entry_or_the_first() -> None:
    ledger = Ledger(None)
    ledger.add_between("F", Action("early"))
    resumed = Ledger(None)
    resumed.load_state_dict(json.loads(json.dumps(ledger.state_dict())))
    resumed.add(LARGE, {}, {"G": [Action("now")]})
    resumed.add_between("F", Action("late"))
    assert [line["action"] for line in resumed.lines()] == ["early", "now", "late"]
    resumed.add(LARGE, {}, {})
    assert len(resumed.lines()) == 3
