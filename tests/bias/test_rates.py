"""Figures over all classes or groups, their intervals, and the shift of the priors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import balanced_accuracy_score, f1_score

from attn_callbacks.bias import BiasReport, PriorShift

NAMES = tuple("abcde")


def make(counts, **arguments):
    counts = torch.as_tensor(counts)
    if len(counts) > 1:
        arguments.setdefault("group_names", tuple(f"group {i}" for i in range(len(counts))))
    return BiasReport(0, 0, counts, NAMES[: counts.shape[1]], **arguments)


def samples_of(counts):
    group, target, predicted = np.nonzero(np.asarray(counts))
    times = np.asarray(counts)[group, target, predicted]
    return (np.repeat(part, times) for part in (group, target, predicted))


GROUPED = [[[40, 8, 2], [9, 30, 6], [1, 4, 12]], [[25, 20, 0], [3, 60, 7], [2, 2, 30]]]


def test_means_equal_sklearn():
    report = make(GROUPED)
    _, target, predicted = samples_of(GROUPED)
    assert report.macro_f1 == pytest.approx(f1_score(target, predicted, average="macro"))
    assert report.balanced_accuracy == pytest.approx(balanced_accuracy_score(target, predicted))


def test_means_leave_out_classes_that_are_not_there():
    report = make([[[30, 10, 2], [10, 30, 0], [0, 0, 0]]])
    assert report.macro_f1 == pytest.approx((2 * 30 / 82 + 2 * 30 / 80) / 2)
    assert report.balanced_accuracy == pytest.approx((30 / 42 + 30 / 40) / 2)
    assert math.isnan(make(torch.zeros(1, 2, 2)).macro_f1)


def test_score_intervals_equal_scipy():
    report = make(GROUPED)
    group, target, predicted = samples_of(GROUPED)
    right = target == predicted

    def expected(hits):
        interval = stats.binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
        return [interval.low, interval.high]

    assert report.interval("accuracy").tolist() == pytest.approx(expected(right))
    for c in range(3):
        assert report.interval("recall")[c].tolist() == pytest.approx(expected(right[target == c]))
        assert report.interval("precision")[c].tolist() == pytest.approx(expected(right[predicted == c]))
        for g in range(2):
            cell = right[(target == c) & (group == g)]
            assert report.interval("cell_recall")[g, c].tolist() == pytest.approx(expected(cell))
    for g in range(2):
        assert report.interval("group_accuracy")[g].tolist() == pytest.approx(expected(right[group == g]))


def test_f1_interval_is_that_of_the_shared_part():
    report = make(GROUPED)
    _, target, predicted = samples_of(GROUPED)
    for c in range(3):
        union = (target == c) | (predicted == c)
        jaccard = stats.binomtest(int(((target == c) & (predicted == c)).sum()), int(union.sum()))
        shared = jaccard.proportion_ci(method="wilson")
        expected = [2 * bound / (1 + bound) for bound in (shared.low, shared.high)]
        assert report.interval("f1")[c].tolist() == pytest.approx(expected)
        assert expected[0] < float(report.f1[c]) < expected[1]


@pytest.mark.parametrize(
    "name",
    ["worst_class_recall", "worst_group_accuracy", "worst_cell_recall", "gap", "macro_f1", "balanced_accuracy"],
)
def test_drawn_intervals_against_drawn_samples(name):
    report = make(GROUPED, min_support=15)
    group, target, predicted = samples_of(GROUPED)
    generator, values = np.random.default_rng(0), []
    for index in generator.integers(len(target), size=(300, len(target))):
        counts = np.zeros((2, 3, 3), dtype=np.int64)
        np.add.at(counts, (group[index], target[index], predicted[index]), 1)
        values.append(getattr(make(counts, min_support=1), name))
    value = getattr(report, name)
    low, high = np.quantile(values, [0.025, 0.975])
    expected = min(low, 2 * value - high), max(high, 2 * value - low)
    if name != "gap":
        assert report.interval(name).tolist() == pytest.approx(expected, abs=0.035)
    got = report.interval(name).tolist()
    assert got[0] <= value <= got[1]
    assert 0 < got[1] - got[0] < 0.4


def test_gap_interval_is_about_groups_or_classes():
    table = torch.tensor(GROUPED)
    grouped, whole = make(table), make(table.sum(dim=0, keepdim=True))
    assert grouped.gap != whole.gap
    for report in (grouped, whole):
        low, high = report.interval("gap").tolist()
        assert low <= report.gap <= high


def test_intervals_of_what_cannot_be_estimated_are_nan():
    report = make([[[30, 5], [0, 0]]])
    assert report.interval("recall")[1].isnan().all()
    assert report.interval("f1")[1].isnan().all()
    for name in ("gap", "worst_group_accuracy", "worst_cell_recall"):
        assert report.interval(name).isnan().all()
    low, high = report.interval("worst_class_recall").tolist()
    assert 0.6 < low < 30 / 35 < high < 1
    assert math.isnan(report.demographic_parity.difference)


def test_perfect_worst_case_is_not_certain():
    low, high = make([[[25, 0], [0, 25]]]).interval("worst_class_recall").tolist()
    assert low < 0.96
    assert high == 1


def test_interval_is_drawn_once(monkeypatch):
    report = make(GROUPED)
    first = report.interval("macro_f1")
    monkeypatch.setattr("attn_callbacks.bias._extremes.margins_interval", None)
    assert report.interval("macro_f1") is first


def test_unknown_interval_is_refused():
    with pytest.raises(ValueError, match=r"`name` must be one of 'recall', .*, got 'support'"):
        make(GROUPED).interval("support")


def test_prior_shift_by_hand():
    report = make([[[40, 10], [30, 20]]], train_counts=torch.tensor([[90, 10]]))
    shift = report.prior_shift
    assert shift.label_shift.tolist() == pytest.approx([-0.4, 0.4])
    assert shift.prediction_shift.tolist() == pytest.approx([-0.2, 0.2])
    assert shift.excess.tolist() == pytest.approx([0.2, -0.2])
    distances = shift.label_distance, shift.prediction_distance, shift.excess_distance
    assert distances == pytest.approx((0.4, 0.2, 0.2))
    assert report.training_prior.tolist() == pytest.approx([0.9, 0.1])


def test_prior_shift_without_training_counts():
    shift = make([[[40, 10], [30, 20]]]).prior_shift
    assert math.isnan(shift.label_distance)
    assert shift.excess_distance == pytest.approx(0.2)


def test_priors_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match=r"`training` must have shape \(2,\), got \(3,\)"):
        PriorShift(torch.ones(3), torch.ones(2), torch.ones(2))


def test_disparities_use_the_support_of_the_report():
    counts = [[[40, 10], [10, 40]], [[40, 10], [10, 40]], [[0, 9], [0, 10]]]
    assert make(counts).demographic_parity.difference == 0
    assert make(counts, min_support=19).demographic_parity.difference == pytest.approx(0.5)
    assert make(counts, min_support=9).equalised_odds.difference == pytest.approx(0.8)
