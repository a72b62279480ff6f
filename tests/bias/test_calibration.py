"""Calibration by class and group against single samples in plain numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from attn_callbacks.bias import Calibration

BINS = 10


def draw(samples=2000, groups=2, classes=3, seed=0, sharpness=1.0):
    generator = np.random.default_rng(seed)
    group, target = generator.integers(groups, size=samples), generator.integers(classes, size=samples)
    confidence = generator.uniform(0.34, 1, size=samples)
    right = generator.random(samples) < confidence**sharpness
    loss = generator.exponential(0.5, size=samples)
    bins, losses = np.zeros((groups, classes, BINS, 3)), np.zeros((groups, classes, 2))
    for g, t, c, r, value in zip(group, target, confidence, right, loss, strict=True):
        bins[g, t, min(int(c * BINS), BINS - 1)] += (1, c, r)
        losses[g, t] += (value, value**2)
    return group, target, confidence, right, loss, Calibration(torch.from_numpy(bins), torch.from_numpy(losses))


def ece(confidence, right):
    total = 0.0
    for place in range(BINS):
        inside = np.minimum((confidence * BINS).astype(int), BINS - 1) == place
        if inside.any():
            total += inside.sum() * abs(confidence[inside].mean() - right[inside].mean())
    return total / len(right)


def test_errors_equal_numpy():
    group, target, confidence, right, _, calibration = draw(sharpness=2.0)
    assert calibration.ece == pytest.approx(ece(confidence, right))
    for g in range(2):
        assert float(calibration.group_ece[g]) == pytest.approx(ece(confidence[group == g], right[group == g]))
    for c in range(3):
        assert float(calibration.class_ece[c]) == pytest.approx(ece(confidence[target == c], right[target == c]))


def test_losses_equal_numpy():
    group, target, _, _, loss, calibration = draw()
    assert calibration.mean_loss == pytest.approx(loss.mean())
    for g in range(2):
        own = loss[group == g]
        assert float(calibration.group_loss[g]) == pytest.approx(own.mean())
        assert float(calibration.group_loss_error[g]) == pytest.approx(own.std(ddof=1) / math.sqrt(len(own)))
        for c in range(3):
            assert float(calibration.cell_loss[g, c]) == pytest.approx(loss[(group == g) & (target == c)].mean())
            assert int(calibration.support[g, c]) == ((group == g) & (target == c)).sum()
    for c in range(3):
        own = loss[target == c]
        assert float(calibration.class_loss[c]) == pytest.approx(own.mean())
        assert float(calibration.class_loss_error[c]) == pytest.approx(own.std(ddof=1) / math.sqrt(len(own)))


def test_interval_against_drawn_samples():
    _, _, confidence, right, _, calibration = draw(samples=400, sharpness=3.0)
    generator = np.random.default_rng(1)
    values = [ece(confidence[index], right[index]) for index in generator.integers(400, size=(500, 400))]
    low, high = np.quantile(values, [0.025, 0.975])
    expected = min(low, 2 * calibration.ece - high), max(high, 2 * calibration.ece - low)
    assert calibration.ece_interval == pytest.approx(expected, abs=0.02)


def test_interval_of_a_calibrated_model_reaches_down():
    *_, calibration = draw(samples=500)
    assert calibration.ece > 0.02  # by chance alone
    assert calibration.ece_interval[0] < 0.015
    assert calibration.ece_interval[0] <= calibration.ece <= calibration.ece_interval[1]


def test_without_samples_it_is_nan():
    calibration = Calibration(torch.zeros(1, 2, 5, 3), torch.zeros(1, 2, 2))
    assert math.isnan(calibration.ece)
    assert math.isnan(calibration.mean_loss)
    assert calibration.class_ece.isnan().all()
    assert calibration.class_loss_error.isnan().all()
    assert all(map(math.isnan, calibration.ece_interval))


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"`bins` must have shape \(groups, classes, bins, 3\), got \(2, 5, 3\)"):
        Calibration(torch.zeros(2, 5, 3), torch.zeros(1, 2, 2))
    with pytest.raises(ValueError, match=r"`loss` must have shape \(1, 2, 2\), got \(2, 2\)"):
        Calibration(torch.zeros(1, 2, 5, 3), torch.zeros(2, 2))
