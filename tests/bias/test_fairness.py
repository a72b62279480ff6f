"""Disparities between groups against fairlearn, plain numpy, and numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from attn_callbacks.bias.fairness import demographic_parity, equalised_odds


def draw(groups=3, classes=2, samples=600, seed=0):
    generator = np.random.default_rng(seed)
    group, target = generator.integers(groups, size=samples), generator.integers(classes, size=samples)
    wrong = generator.random(samples) < 0.15 + 0.15 * group
    predicted = np.where(wrong, generator.integers(classes, size=samples), target)
    counts = np.zeros((groups, classes, classes), dtype=np.int64)
    for g, t, p in zip(group, target, predicted, strict=True):
        counts[g, t, p] += 1
    return group, target, predicted, torch.from_numpy(counts)


@pytest.mark.parametrize("seed", range(3))
def test_two_classes_equal_fairlearn(seed):
    metrics = pytest.importorskip("fairlearn.metrics")
    group, target, predicted, counts = draw(seed=seed)
    arguments = {"y_true": target, "y_pred": predicted, "sensitive_features": group}
    parity, odds = demographic_parity(counts, 1), equalised_odds(counts, 1)
    assert float(parity.class_difference[1]) == pytest.approx(metrics.demographic_parity_difference(**arguments))
    assert parity.difference == pytest.approx(metrics.demographic_parity_difference(**arguments))
    assert float(parity.class_ratio[1]) == pytest.approx(metrics.demographic_parity_ratio(**arguments))
    assert float(odds.class_ratio[1]) == pytest.approx(metrics.equalized_odds_ratio(**arguments))
    assert odds.difference == pytest.approx(metrics.equalized_odds_difference(**arguments))


def by_samples(group, target, predicted, groups, classes):
    """Difference and ratio of parity, and difference of odds, of each class."""
    parity, ratio, odds = [], [], []
    for c in range(classes):
        told = np.array([(predicted[group == g] == c).mean() for g in range(groups)])
        true = np.array([(predicted[(group == g) & (target == c)] == c).mean() for g in range(groups)])
        false = np.array([(predicted[(group == g) & (target != c)] == c).mean() for g in range(groups)])
        parity.append(np.ptp(told))
        ratio.append(told.min() / told.max())
        odds.append(max(np.ptp(true), np.ptp(false)))
    return parity, ratio, odds


@pytest.mark.parametrize(("groups", "classes"), [(2, 2), (3, 4), (2, 5)])
def test_many_classes_equal_numpy(groups, classes):
    group, target, predicted, counts = draw(groups, classes)
    parity, ratio, odds = by_samples(group, target, predicted, groups, classes)
    got = demographic_parity(counts, 1)
    assert got.class_difference.tolist() == pytest.approx(parity)
    assert got.class_ratio.tolist() == pytest.approx(ratio)
    assert got.difference == pytest.approx(max(parity))
    assert got.ratio == pytest.approx(min(ratio))
    assert equalised_odds(counts, 1).class_difference.tolist() == pytest.approx(odds)
    assert got.support == min(np.bincount(group))


def test_group_without_support_is_left_out():
    fair = torch.tensor([[[40, 10], [10, 40]], [[40, 10], [10, 40]]])
    rare = torch.tensor([[[0, 9], [0, 10]]])  # 19 samples, all predicted positive
    counts = torch.cat([fair, rare, torch.zeros_like(rare)])
    assert demographic_parity(counts, 20).difference == 0
    assert demographic_parity(counts, 20).support == 100
    assert demographic_parity(counts, 19).difference == pytest.approx(0.5)
    assert equalised_odds(counts, 20).difference == 0
    assert equalised_odds(counts, 11).difference == 0
    assert equalised_odds(counts, 10).difference == pytest.approx(0.2)  # true positives of the rare group
    assert equalised_odds(counts, 9).difference == pytest.approx(0.8)  # and its false ones


def test_class_that_a_group_lacks_is_compared_by_false_positives_alone():
    counts = torch.tensor([[[40, 10, 0], [10, 40, 0], [0, 0, 0]], [[30, 20, 0], [20, 30, 0], [5, 5, 10]]])
    odds = equalised_odds(counts, 20)
    # class 0: true positives 40 and 30 of 50, false ones 10 of 50 and 25 of 70
    assert odds.class_difference.tolist() == pytest.approx([0.2, 0.2, 0.0])
    assert odds.support == 50


@pytest.mark.parametrize("counts", [torch.full((1, 2, 2), 50), torch.zeros(3, 2, 2, dtype=torch.int64)])
def test_fewer_than_two_groups_is_nan(counts):
    for disparity in (demographic_parity(counts, 20), equalised_odds(counts, 20)):
        assert math.isnan(disparity.difference)
        assert math.isnan(disparity.ratio)
        assert all(map(math.isnan, disparity.interval))
        assert disparity.support == 0


def test_interval_against_drawn_samples():
    group, target, predicted, counts = draw(groups=2, classes=3, samples=400)
    generator, parities, odds = np.random.default_rng(1), [], []
    for index in generator.integers(400, size=(300, 400)):
        parity, _, odd = by_samples(group[index], target[index], predicted[index], 2, 3)
        parities.append(max(parity))
        odds.append(max(odd))
    for values, got in ((parities, demographic_parity(counts, 20)), (odds, equalised_odds(counts, 20))):
        low, high = np.quantile(values, [0.025, 0.975])
        expected = max(0.0, min(low, 2 * got.difference - high)), max(high, 2 * got.difference - low)
        assert got.interval == pytest.approx(expected, abs=0.025)
