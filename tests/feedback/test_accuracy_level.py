"""The level of accuracy: what a fall is, and how rarely chance looks like one."""

from __future__ import annotations

import math

import numpy as np
import pytest

from attn_callbacks.feedback._accuracy_level import AccuracyLevel, compared
from attn_callbacks.feedback.strength import Evidence, StrengthSettings, StrengthState, strength_step


def walk(values, error=0.001, tolerance=0.02):
    level, falls, means = None, [], []
    for value in values:
        level, fell = compared(level, value, error, tolerance)
        falls.append(fell)
        means.append(level.mean)
    return falls, means


def test_chance_alone_rarely_lowers_the_strength():
    """The best of 20 reports would be an unlucky yardstick: five runs in six would be lowered."""
    drawn = np.random.default_rng(0).binomial(400, 0.8, (300, 20)) / 400
    error, lowered = math.sqrt(0.8 * 0.2 / 400), 0
    for run in drawn:
        state = StrengthState()
        for value in run:
            state = strength_step(state, Evidence({"accuracy": (float(value), error)}, None), StrengthSettings())
        lowered += state.factor < 1
    assert lowered / len(drawn) < 0.15


def test_a_ruined_fit_is_seen_after_learning():
    drawn = np.random.default_rng(1).binomial(400, [0.5, 0.6, 0.7, 0.8, 0.9, 0.9, 0.9, 0.75, 0.75], (100, 9)) / 400
    found = [walk(run, error=0.02)[0] for run in drawn]
    assert np.mean([any(falls[:7]) for falls in found]) < 0.1
    assert np.mean([any(falls[7:]) for falls in found]) > 0.95


def test_mean_of_the_first_reports_then_a_running_one():
    values = [0.80, 0.81, 0.79, 0.805, 0.80, 0.81, 0.79, 0.80]
    assert walk(values)[1][-1] == pytest.approx(np.mean(values))
    level = AccuracyLevel(0.80, 0.001, 50)
    assert compared(level, 0.81, 0.001, 0.02)[0] == (pytest.approx(0.80 + 0.01 / 8), pytest.approx(0.001), 51)


def test_what_is_clearly_better_weighs_half():
    assert compared(AccuracyLevel(0.5, 0.001, 50), 0.9, 0.003, 0.02)[0] == (
        pytest.approx(0.7),
        pytest.approx(0.002),
        51,
    )


def test_what_is_lost_stays_lost_until_it_is_back():
    falls, means = walk([0.9] + [0.8] * 30 + [0.9, 0.89])
    assert falls == [False] + [True] * 30 + [False, False]
    assert means[30] == 0.9


def test_not_measured_changes_nothing():
    assert compared(None, math.nan, math.nan, 0.02) == (None, False)
    level = AccuracyLevel(0.9, 0.01, 3)
    assert compared(level, math.nan, math.nan, 0.02) == (level, False)
