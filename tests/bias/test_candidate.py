"""Candidate findings: what may be spurious where nothing was marked."""

from __future__ import annotations

import math

import pytest
from scipy import stats

from attn_callbacks.bias import Candidate
from tests.bias.test_diagnosis import FAIR, only, reliance, report, share


def candidate(p_value=1e-6, wrong=0.3, right=0.1, support=60, compared=0, name="token 'athos'", **arguments):
    texts = ("from athos", "to athos")
    return Candidate(name, wrong / right, p_value, wrong, right, support, texts, compared, **arguments)


def test_candidate_finding():
    finding = only(report(candidates=(candidate(),)).findings, "feature")
    assert (finding.where, finding.support, finding.answers) == ("token 'athos'", 60, ())
    assert finding.size == pytest.approx(0.2)
    assert finding.evidence == ("Example: from athos", "Example: to athos")
    assert "mark it as spurious" in finding.text
    assert "attention, 0.5 being chance, of 0.30 in wrong predictions and 0.10 in right ones" in finding.text
    assert finding.size / finding.standard_error == pytest.approx(stats.norm.isf(1e-6 / 2))


def test_same_token_by_attention_and_by_presence_are_two_findings():
    found = report(candidates=(candidate(), candidate(wrong=0.9, kind="presence", error=0.1))).findings
    keys = [finding.where for finding in found if finding.kind == "feature"]
    assert keys == ["presence of token 'athos'", "token 'athos'"]
    assert "Candidate token 'athos' goes with errors: it is in a share of 0.90 of wrong predictions" in found[0].text
    assert (found[0].standard_error, found[0].interval) == (0.1, pytest.approx((0.604, 0.996), abs=1e-4))
    wide = report(candidates=(candidate(wrong=0.9, kind="presence", error=0.2),)).findings
    assert wide[0].interval[1] == 1.0


def test_other_kinds_of_candidate_are_refused():
    with pytest.raises(ValueError, match="`kind` must be one of 'attention', 'presence', got 'mass'"):
        candidate(kind="mass")


def test_candidates_are_corrected_for_all_that_were_compared():
    assert len(report(candidates=(candidate(0.001),)).findings) == 1
    assert report(candidates=(candidate(0.001, compared=100),)).findings == ()
    finding = only(report(candidates=(candidate(1e-4, compared=100),)).findings, "feature")
    assert finding.p_value == pytest.approx(0.01)


@pytest.mark.parametrize(
    "arguments",
    [
        {"candidates": (candidate(0.2),)},
        {"candidates": (candidate(wrong=0.11, right=0.1),)},
        {"candidates": (candidate(wrong=0.1, right=0.3),)},
        {"candidates": (candidate(support=19),)},
        {"candidates": (candidate(),), "attention": {"spurious": share([0.1, 0.1])}},
        {"candidates": (candidate(),), "reliance": {"spurious": reliance(5, 5)}},
        {"candidates": (candidate(),), "counts": [FAIR[0], FAIR[0]]},
    ],
    ids=["chance", "dead band", "right", "support", "spurious attention", "spurious reliance", "groups"],
)
def test_no_candidate_finding(arguments):
    assert report(**arguments).findings == ()


@pytest.mark.parametrize("p_value", [0.0, 1e-320])
def test_certain_candidate_stays_finite(p_value):
    finding = only(report(candidates=(candidate(p_value),)).findings, "feature")
    assert 0 < finding.standard_error < math.inf
    assert finding.interval[0] < finding.size < finding.interval[1]
