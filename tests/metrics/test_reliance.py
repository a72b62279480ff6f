"""Right and wrong before and after a region was randomised, against a loop and against paired differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attn_callbacks.metrics.reliance import RelianceCounts, accuracy_drop
from tests.metrics.merging import assert_equal, reduced
from tests.metrics.test_no_wait import assert_updated_in_place


def random_batch(seed: int, samples: int = 40, classes: int = 3) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    before, after, target = torch.randint(classes, (3, samples), generator=generator)
    present = torch.rand(samples, generator=generator) < 0.7
    target[:2] = -100
    return before, after, target, present


def test_counts_match_a_loop():
    metric = RelianceCounts(3)
    expected = np.zeros((3, 2, 2), dtype=int)
    for seed in range(3):
        batch = random_batch(seed)
        metric.update(*batch)
        for before, after, target, present in zip(*(part.tolist() for part in batch), strict=True):
            if present and target >= 0:
                expected[target, int(before == target), int(after == target)] += 1
    assert metric.compute().dtype == torch.int64
    assert metric.compute().tolist() == expected.tolist()
    assert (expected[:, 0, 1] != expected[:, 1, 0]).any()  # else swapped axes would not be seen


def test_without_presence_every_sample_counts():
    before, after, target, _ = random_batch(0)
    metric = RelianceCounts(3)
    metric.update(before, after, target)
    assert metric.compute().sum() == (target >= 0).sum()


def test_two_processes_equal_one_on_the_union():
    halves, union = (RelianceCounts(3), RelianceCounts(3)), RelianceCounts(3)
    for k in range(4):
        halves[k % 2].update(*random_batch(k))
        union.update(*random_batch(k))
    assert_equal(reduced(*halves).compute(), union.compute())


def test_update_reads_no_value_off_the_cpu():
    labels = torch.ones(4, dtype=torch.long, device="meta")
    assert_updated_in_place(RelianceCounts(2).to("meta"), labels, labels, labels, labels.bool())


def test_drop_is_the_mean_paired_difference():
    generator = np.random.default_rng(0)
    before = generator.random(4000) < 0.8
    after = np.where(generator.random(4000) < 0.9, before, generator.random(4000) < 0.3)
    counts = np.zeros((2, 2), dtype=int)
    np.add.at(counts, (before.astype(int), after.astype(int)), 1)
    difference = before.astype(float) - after
    drop, error = accuracy_drop(torch.tensor(counts))
    assert drop.item() == pytest.approx(difference.mean())
    assert error.item() == pytest.approx(difference.std() / np.sqrt(4000), rel=0.01)  # the half samples fade
    unpaired = np.sqrt((before.var() + after.var()) / 4000)
    assert error.item() < 0.6 * unpaired


def test_error_of_the_drop_matches_a_sample_with_half_a_sample_in_each_cell():
    counts = torch.tensor([[[3, 1], [4, 2]], [[5, 0], [0, 7]], [[0, 0], [0, 0]]])
    drop, error = accuracy_drop(counts)
    assert drop.tolist() == pytest.approx([0.3, 0.0, np.nan], nan_ok=True)
    for table, found in zip(counts[:2].numpy() + 0.5, error, strict=False):
        values = np.array([0.0, -1.0, 1.0, 0.0])
        weights = table.ravel() / table.sum()
        variance = (weights * values**2).sum() - (weights * values).sum() ** 2
        assert found.item() == pytest.approx(np.sqrt(variance / table.sum()))
    assert error[2].isnan()
    assert error[1] > 0.05  # twelve samples that did not change make nothing certain


def test_interval_covers_the_drop():
    generator = np.random.default_rng(1)
    for chances, samples in (([0.1, 0.05, 0.25, 0.6], 40), ([0.05, 0.01, 0.04, 0.9], 100), ([0.2, 0.0, 0.6, 0.2], 30)):
        counts = torch.tensor(generator.multinomial(samples, chances, size=4000).reshape(-1, 2, 2))
        drop, error = accuracy_drop(counts)
        covered = ((drop - (chances[2] - chances[1])).abs() < 1.96 * error).double().mean()
        assert 0.925 < covered < 0.985


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"after": [0, 5]}, ValueError, "`after` must lie between 0 and 1, got 5"),
        ({"before": [-1, 1]}, ValueError, "`before` must lie between 0 and 1, got -1"),
        ({"target": [0, 1, 1]}, ValueError, r"`target` must have shape \(samples,\) = \(2,\), got \(3,\)"),
        ({"present": [True]}, ValueError, r"`present` must have shape \(samples,\) = \(2,\), got \(1,\)"),
        ({"after": [0.1, 0.9]}, TypeError, "`after` must hold whole-number labels"),
    ],
)
def test_wrong_update_raises(arguments, error, message):
    batch = {"before": [0, 1], "after": [0, 1], "target": [0, 1], "present": [True, True], **arguments}
    with pytest.raises(error, match=message):
        RelianceCounts(2).update(**{name: torch.tensor(values) for name, values in batch.items()})


def test_wrong_counts_raise():
    with pytest.raises(ValueError, match=r"`counts` must have shape \(..., 2, 2\), got \(3, 4\)"):
        accuracy_drop(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="`num_classes` must be at least 2"):
        RelianceCounts(1)
