"""Bias reports against scikit-learn, plain numpy and numbers worked out by hand."""

from __future__ import annotations

import copy
import json
import math
import pickle

import numpy as np
import pytest
import torch
from sklearn.metrics import classification_report

from attn_callbacks.bias import AttentionShare, BiasReport, Calibration, Candidate, Reliance

NAMES = ("negative", "positive")


def draw(samples=400, classes=3, groups=2, seed=0):
    generator = np.random.default_rng(seed)
    target = generator.integers(classes, size=samples)
    wrong = generator.random(samples) < 0.4
    predicted = np.where(wrong, generator.integers(classes, size=samples), target)
    return generator.integers(groups, size=samples), target, predicted


def count(group, target, predicted, groups, classes):
    counts = np.zeros((groups, classes, classes), dtype=np.int64)
    for g, t, p in zip(group, target, predicted, strict=True):
        counts[g, t, p] += 1
    return torch.from_numpy(counts)


def make(counts, **arguments):
    counts = torch.as_tensor(counts)
    names = tuple(f"class {i}" for i in range(counts.shape[1]))
    if counts.shape[0] > 1:
        arguments.setdefault("group_names", tuple(f"group {i}" for i in range(counts.shape[0])))
    return BiasReport(epoch=2, step=30, counts=counts, class_names=arguments.pop("class_names", names), **arguments)


@pytest.mark.parametrize("seed", range(3))
def test_class_rates_equal_sklearn(seed):
    group, target, predicted = draw(seed=seed)
    report = make(count(group, target, predicted, 2, 3))
    expected = classification_report(target, predicted, output_dict=True)
    for index in range(3):
        row = expected[str(index)]
        got = {
            "precision": report.precision[index],
            "recall": report.recall[index],
            "f1-score": report.f1[index],
            "support": report.class_support[index],
        }
        assert {name: float(value) for name, value in got.items()} == pytest.approx(row)
    assert report.accuracy == pytest.approx(expected["accuracy"])


def test_group_and_cell_rates_equal_numpy():
    group, target, predicted = draw(groups=3)
    report = make(count(group, target, predicted, 3, 3))
    right = predicted == target
    for g in range(3):
        assert float(report.group_accuracy[g]) == pytest.approx(right[group == g].mean())
        assert int(report.group_support[g]) == (group == g).sum()
        for c in range(3):
            cell = (group == g) & (target == c)
            assert float(report.cell_recall[g, c]) == pytest.approx(right[cell].mean())
            assert int(report.support[g, c]) == cell.sum()
    for c in range(3):
        assert float(report.label_prior[c]) == pytest.approx((target == c).mean())
        assert float(report.prediction_prior[c]) == pytest.approx((predicted == c).mean())
    accuracies = [right[group == g].mean() for g in range(3)]
    assert report.worst_group_accuracy == pytest.approx(min(accuracies))
    assert report.gap == pytest.approx(max(accuracies) - min(accuracies))
    assert report.worst_class_recall == pytest.approx(min(right[target == c].mean() for c in range(3)))
    cells = [right[(group == g) & (target == c)].mean() for g in range(3) for c in range(3)]
    assert report.worst_cell_recall == pytest.approx(min(cells))


def test_standard_errors_by_hand():
    report = make([[[20, 0], [12, 36]]])
    # recalls 1 and 0.75; one hit and one miss added: 21/22 and 37/50
    expected = [math.sqrt(21 / 22 * 1 / 22 / 22), math.sqrt(37 / 50 * 13 / 50 / 50)]
    assert report.recall_error.tolist() == pytest.approx(expected)
    assert report.group_accuracy_error.tolist() == pytest.approx([math.sqrt(57 / 70 * 13 / 70 / 70)])


def test_absent_class_is_nan_and_not_fair():
    report = make([[[30, 5, 1], [10, 20, 0], [0, 0, 0]]])
    assert [bool(value) for value in report.recall.isnan()] == [False, False, True]
    assert math.isnan(report.f1[2])
    assert float(report.precision[2]) == 0.0  # one prediction, and it was wrong
    assert report.worst_class_recall == pytest.approx(20 / 30)
    assert report.gap == pytest.approx(30 / 36 - 20 / 30)


def test_class_never_predicted_has_no_precision_but_an_f1():
    report = make([[[30, 0], [20, 0]]])
    assert math.isnan(report.precision[1])
    assert float(report.f1[1]) == 0.0
    assert float(report.recall[1]) == 0.0


def test_absent_group_is_left_out_of_the_gap():
    counts = [[[40, 10], [10, 40]], [[0, 0], [0, 0]], [[30, 20], [20, 30]]]
    report = make(counts)
    assert math.isnan(report.group_accuracy[1])
    assert report.worst_group_accuracy == pytest.approx(0.6)
    assert report.gap == pytest.approx(0.2)


def test_too_little_support_is_not_a_worst_case():
    counts = [[[40, 10], [19, 0]]]
    assert math.isnan(make(counts).gap)
    assert make(counts).worst_class_recall == pytest.approx(0.8)
    assert make(counts, min_support=19).worst_class_recall == 0.0
    assert make(counts, min_support=19).gap == pytest.approx(0.8)


def test_one_class_only():
    report = make([[[50]]])
    assert report.worst_class_recall == 1.0
    assert math.isnan(report.gap)
    assert report.findings == ()
    assert "n/a" in report.summary()


@pytest.mark.parametrize("groups", [1, 2])
def test_empty_validation_gives_nan_and_no_error(groups):
    share = AttentionShare(torch.full((2,), math.nan), torch.full((2,), math.nan), torch.zeros(2))
    zeros = torch.zeros(groups, 2, dtype=torch.int64)
    report = make(torch.zeros(groups, 2, 2), train_counts=zeros, attention={"spurious": share})
    assert math.isnan(report.accuracy)
    assert math.isnan(report.gap)
    assert math.isnan(report.worst_class_recall)
    assert report.findings == ()
    assert "No finding" in report.summary()
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["recall"] == [None, None]


def test_without_groups_nothing_is_said_about_groups():
    report = make([[[90, 10], [40, 60]]])
    assert not report.has_groups
    assert report.group_names == ("all",)
    assert math.isnan(report.worst_group_accuracy)
    assert math.isnan(report.worst_cell_recall)
    assert report.gap == pytest.approx(0.3)
    assert {finding.kind for finding in report.findings} == {"class"}
    assert "group" not in report.summary()


def test_report_does_not_follow_the_accumulator():
    counts, fed = torch.ones(1, 2, 2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.int64)
    mass = torch.ones(2, dtype=torch.float64)
    attention = {"spurious": AttentionShare(mass, mass, torch.ones(2, dtype=torch.int64))}
    report = make(counts, train_counts=fed, attention=attention)
    for tensor in (counts, fed, mass):
        tensor.zero_()
    attention.clear()
    assert report.counts.sum() == 4
    assert report.train_counts.sum() == 2
    assert report.attention["spurious"].mass.sum() == 2


def test_report_is_frozen_and_can_be_pickled():
    report = make([[[90, 10], [40, 60]]])
    assert report.gap == pytest.approx(0.3)
    with pytest.raises(AttributeError):
        report.epoch = 3
    for twin in (pickle.loads(pickle.dumps(report)), copy.deepcopy(report)):
        assert twin.to_dict() == report.to_dict()


def test_dict_survives_json():
    group, target, predicted = draw()
    counts = count(group, target, predicted, 2, 3)
    counts[:, 2] = 0
    share = AttentionShare(torch.tensor([0.2, 0.1, math.nan]), torch.tensor([2.0, 1.0, math.nan]), torch.ones(3))
    report = make(counts, train_counts=counts.sum(2), attention={"relevance": share})
    values = report.to_dict()
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert values["counts"] == counts.tolist()
    assert values["train_counts"] == counts.sum(2).tolist()
    assert values["recall"][2] is None
    assert values["attention"]["relevance"]["mass"] == [pytest.approx(0.2), pytest.approx(0.1), None]
    assert values["class_names"] == ["class 0", "class 1", "class 2"]
    assert values["worst_class_recall"] == report.worst_class_recall


def test_dict_holds_the_findings():
    (finding,) = make([[[90, 10], [40, 60]]], class_names=NAMES).to_dict()["findings"]
    assert finding["where"] == "positive"
    assert finding["size"] == pytest.approx(0.3)
    assert finding["interval"] == [pytest.approx(0.19, abs=0.02), pytest.approx(0.41, abs=0.02)]
    assert finding["answers"] == ["ClassReweighting", "Resampling"]
    assert set(finding) == {
        *("kind", "where", "size", "standard_error", "support", "text", "interval", "p_value", "answers", "evidence")
    }


def full():
    counts = torch.tensor([[[40, 10], [12, 38]], [[30, 20], [9, 41]]])
    bins = torch.zeros(2, 2, 5, 3)
    bins[:, :, 4] = torch.stack([counts.sum(2), 0.9 * counts.sum(2), counts.diagonal(dim1=1, dim2=2)], dim=-1)
    share = AttentionShare(*torch.tensor([[0.2, 0.1], [2.0, 1.0], [90, 90]]), error=torch.tensor([0.01, 0.01]))
    return make(
        counts,
        attention={"spurious": share},
        reliance={"spurious": Reliance(torch.tensor([[[5, 1], [14, 30]], [[5, 5], [5, 35]]]))},
        calibration=Calibration(bins, torch.stack([counts.sum(2) * 0.5, counts.sum(2) * 0.4], dim=-1)),
        divergence=torch.tensor([[0.0, 0.3], [0.3, math.nan]]),
        candidates=[Candidate("token 'athos'", math.inf, 1e-5, 0.2, 0.0, 30, ("from athos",))],
    )


def test_dict_holds_everything_that_was_measured():
    report = full()
    values = report.to_dict()
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert values["reliance"]["spurious"]["drop"] == pytest.approx(report.reliance["spurious"].drop)
    assert values["calibration"]["class_ece"] == pytest.approx(report.calibration.class_ece.tolist())
    assert values["attention"]["spurious"]["error"] == pytest.approx([0.01, 0.01])
    assert values["divergence"] == [[0.0, pytest.approx(0.3)], [pytest.approx(0.3), None]]
    assert values["candidates"][0]["examples"] == ["from athos"]
    assert values["candidates"][0]["lift"] is None
    assert values["demographic_parity"]["difference"] == report.demographic_parity.difference
    assert values["equalised_odds"]["interval"] == list(report.equalised_odds.interval)
    assert values["prior_shift"]["excess_distance"] == report.prior_shift.excess_distance
    assert values["macro_f1"] == report.macro_f1
    assert set(values["intervals"]) == {
        *("recall", "precision", "f1", "accuracy", "cell_recall", "group_accuracy", "worst_class_recall"),
        *("worst_group_accuracy", "worst_cell_recall", "gap", "macro_f1", "balanced_accuracy"),
    }
    assert values["intervals"]["recall"] == report.interval("recall").tolist()


def test_full_report_can_be_pickled():
    report = full()
    report.to_dict()
    twin = pickle.loads(pickle.dumps(report))
    assert twin.to_dict() == report.to_dict()


def test_optional_parts_are_absent_by_default():
    report = make([[[90, 10], [40, 60]]])
    assert report.reliance == {}
    assert report.calibration is None
    assert report.divergence is None
    assert report.candidates == ()


def test_train_counts_may_be_missing():
    report = make([[[90, 10], [40, 60]]])
    assert report.to_dict()["train_counts"] is None
    assert "training prior" not in report.summary()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"counts": torch.zeros(2, 2)}, r"`counts` must have shape \(groups, classes, classes\) = \(1, 2, 2\)"),
        ({"counts": torch.zeros(2, 2, 2)}, r"got \(2, 2, 2\): `group_names` has 1 names"),
        ({"counts": torch.zeros(1, 3, 3)}, r"`class_names` 2"),
        (
            {"train_counts": torch.zeros(2)},
            r"`train_counts` must have shape \(groups, classes\) = \(1, 2\), got \(2,\)",
        ),
        (
            {"attention": {"spurious": AttentionShare(torch.ones(3), torch.ones(3), torch.ones(3))}},
            r"`attention\['spurious'\]` must have shape \(classes,\) = \(2,\), got \(3,\)",
        ),
        (
            {"reliance": {"spurious": Reliance(torch.ones(3, 2, 2))}},
            r"`reliance\['spurious'\]` must have shape \(classes,\) = \(2,\), got \(3,\)",
        ),
        (
            {"calibration": Calibration(torch.ones(2, 2, 5, 3), torch.ones(2, 2, 2))},
            r"`calibration` must have shape \(groups, classes\) = \(1, 2\), got \(2, 2\)",
        ),
        ({"divergence": torch.zeros(2)}, r"`divergence` must have shape \(classes, classes\) = \(2, 2\), got \(2,\)"),
        ({"min_support": 0}, "`min_support` must be at least 1, got 0"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        BiasReport(**{"epoch": 0, "step": 0, "counts": torch.zeros(1, 2, 2), "class_names": NAMES, **arguments})
