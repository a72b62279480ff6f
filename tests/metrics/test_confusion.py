"""Confusion counts per group: absent groups, ignored targets, labels out of range."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attn_callbacks.metrics import GroupConfusion
from tests.metrics.merging import assert_equal, reduced


def random_labels(samples: int, seed: int, classes: int = 3, groups: int = 4) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(size, (samples,), generator=generator) for size in (classes, classes, groups))


def test_counts_match_a_loop():
    metric = GroupConfusion(3, 4)
    expected = np.zeros((4, 3, 3), dtype=int)
    for seed in range(3):
        predicted, target, group = random_labels(50, seed)
        target[:5] = -100
        metric.update(predicted, target, group)
        for p, t, g in zip(predicted.tolist(), target.tolist(), group.tolist(), strict=True):
            if t >= 0:
                expected[g, t, p] += 1
    assert metric.compute().dtype == torch.int64
    assert metric.compute().tolist() == expected.tolist()


def test_group_absent_from_a_batch_keeps_its_number():
    metric = GroupConfusion(num_classes=2, num_groups=3)
    metric.update(torch.tensor([1, 1, 0]), torch.tensor([1, 1, 1]), torch.tensor([0, 2, 2]))
    metric.update(torch.tensor([0]), torch.tensor([0]), torch.tensor([2]))
    counts = metric.compute()
    assert counts[0].tolist() == [[0, 0], [0, 1]]
    assert counts[1].tolist() == [[0, 0], [0, 0]]
    assert counts[2].tolist() == [[1, 0], [1, 1]]


def test_no_group_counts_in_group_zero():
    metric = GroupConfusion(2)
    metric.update(torch.tensor([0, 1]), torch.tensor([0, 0]))
    assert metric.compute().tolist() == [[[1, 1], [0, 0]]]


def test_two_processes_equal_one_on_the_union():
    halves, union = (GroupConfusion(3, 4), GroupConfusion(3, 4)), GroupConfusion(3, 4)
    for k in range(4):
        halves[k % 2].update(*random_labels(20, k))
        union.update(*random_labels(20, k))
    assert_equal(reduced(*halves).compute(), union.compute())


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (([0, 2], [0, 1], [0, 1]), "`predicted` must lie between 0 and 1, got 2"),
        (([0, -1], [0, 1], [0, 1]), "`predicted` must lie between 0 and 1, got -1"),
        (([0, 1], [0, 7], [0, 1]), "`target` must lie between 0 and 1, got 7"),
        (([0, 1], [0, 1], [0, 3]), "`group` must lie between 0 and 2, got 3"),
        (([0, 1], [0, 1], [-1, 0]), "`group` must lie between 0 and 2, got -1"),
        (([0, 1], [0], [0, 0]), r"`target` must have shape \(samples,\) = \(2,\), got \(1,\)"),
        (([[0, 1]], [0], [0]), "`predicted` must have 1 axes"),
    ],
)
def test_wrong_labels_raise(labels, message):
    with pytest.raises(ValueError, match=message):
        GroupConfusion(2, 3).update(*map(torch.tensor, labels))


def test_wrong_labels_of_one_process_raise_in_all(monkeypatch):
    monkeypatch.setattr(GroupConfusion, "check_labels", lambda self: None)  # as on an accelerator, until compute
    good, bad = GroupConfusion(2), GroupConfusion(2)
    good.update(torch.tensor([0, 1]), torch.tensor([0, 1]))
    bad.update(torch.tensor([0, 0]), torch.tensor([0, 5]))
    assert bad.compute().sum() == 1  # never counted where it does not belong
    monkeypatch.undo()
    for order in ((good, bad), (bad, good)):
        with pytest.raises(ValueError, match="`target` must lie between 0 and 1, got 5"):
            reduced(*order).compute()


def test_ignored_samples_may_carry_any_label():
    metric = GroupConfusion(2)
    metric.update(torch.tensor([9, 1]), torch.tensor([-100, 1]), torch.tensor([-1, 0]))
    assert metric.compute().tolist() == [[[0, 0], [0, 1]]]


def test_scores_in_place_of_labels_raise():
    with pytest.raises(TypeError, match=r"`predicted` must hold whole-number labels, got torch.float32. Take `argmax`"):
        GroupConfusion(2).update(torch.tensor([0.2, 0.8]), torch.tensor([0, 1]))


def test_empty_batch_counts_nothing():
    metric = GroupConfusion(2)
    metric.update(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long))
    assert metric.compute().sum() == 0


@pytest.mark.parametrize(("sizes", "message"), [((1, 1), "`num_classes` .* at least 2"), ((2, 0), "`num_groups` .* 1")])
def test_wrong_size_raises(sizes, message):
    with pytest.raises(ValueError, match=message):
        GroupConfusion(*sizes)
