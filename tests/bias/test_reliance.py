"""Functional reliance against plain numpy and scipy's exact tests."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from scipy import stats

from attn_callbacks.bias import Reliance
from attn_callbacks.bias.intervals import paired_interval


def draw(samples=300, classes=3, seed=0):
    generator = np.random.default_rng(seed)
    target = generator.integers(classes, size=samples)
    before = generator.random(samples) < 0.8
    after = np.where(generator.random(samples) < 0.3, generator.random(samples) < 0.4, before)
    counts = np.zeros((classes, 2, 2), dtype=np.int64)
    for t, b, a in zip(target, before, after, strict=True):
        counts[t, int(b), int(a)] += 1
    return target, before, after, Reliance(torch.from_numpy(counts))


def test_drop_equals_numpy():
    target, before, after, reliance = draw()
    assert reliance.support == 300
    assert reliance.before == pytest.approx(before.mean())
    assert reliance.after == pytest.approx(after.mean())
    assert reliance.drop == pytest.approx(before.mean() - after.mean())
    for label in range(3):
        own = target == label
        assert float(reliance.class_drop[label]) == pytest.approx(before[own].mean() - after[own].mean())
        assert int(reliance.class_support[label]) == own.sum()


def test_error_is_that_of_paired_differences():
    _, before, after, reliance = draw(samples=5000)
    change = before.astype(float) - after
    assert reliance.error == pytest.approx(change.std() / math.sqrt(5000), rel=0.01)
    unpaired = math.sqrt((before.var() + after.var()) / 5000)
    assert reliance.error < 0.9 * unpaired


def test_class_errors_by_hand():
    reliance = Reliance(torch.tensor([[[10, 2], [8, 30]], [[0, 0], [0, 20]]]))
    expected = []
    for lost, gained, size in ((8.5, 2.5, 52), (0.5, 0.5, 22)):  # half a sample added to each of four cells
        expected.append(math.sqrt(lost + gained - (lost - gained) ** 2 / size) / size)
    assert reliance.class_error.tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("lost", "gained"), [(12, 2), (2, 12), (5, 5), (1, 0), (0, 0), (40, 21), (700, 600)])
def test_p_value_is_the_exact_mcnemar_test(lost, gained):
    reliance = Reliance(torch.tensor([[[10, gained], [lost, 30]]]))
    expected = stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    assert reliance.p_value == pytest.approx(expected, rel=1e-9)


def test_intervals_are_those_of_the_pairs():
    *_, reliance = draw()
    assert reliance.interval == pytest.approx(tuple(paired_interval(reliance.counts.sum(dim=0)).tolist()))
    torch.testing.assert_close(reliance.class_interval, paired_interval(reliance.counts))
    assert reliance.interval[0] < reliance.drop < reliance.interval[1]


def test_a_class_without_samples_is_nan():
    reliance = Reliance(torch.tensor([[[1, 0], [4, 5]], [[0, 0], [0, 0]]]))
    assert math.isnan(reliance.class_drop[1])
    assert math.isnan(reliance.class_error[1])
    assert reliance.class_interval[1].isnan().all()
    empty = Reliance(torch.zeros(2, 2, 2))
    assert all(math.isnan(value) for value in (empty.drop, empty.error, empty.p_value, *empty.interval))


def test_dict_survives_json():
    *_, reliance = draw()
    values = reliance.to_dict()
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert values["method"] == "shuffle"
    assert values["drop"] == reliance.drop
    assert values["counts"] == reliance.counts.tolist()
    assert len(values["class_interval"]) == 3


def test_it_does_not_follow_the_accumulator():
    counts = torch.ones(2, 2, 2, dtype=torch.int64)
    reliance = Reliance(counts)
    counts.zero_()
    assert reliance.support == 8


@pytest.mark.parametrize("shape", [(2, 2), (3, 2, 3), (3, 3, 2)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"`counts` must have shape \(classes, 2, 2\), got"):
        Reliance(torch.zeros(shape))
