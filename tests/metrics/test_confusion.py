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
        (
            ([0, 1], [0, 1], [0, 3]),
            r"`group` must lie between 0 and 2, got 3: there are 3 groups\. Pass `groups=` names for all\.",
        ),
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
    with pytest.raises(
        TypeError, match=r"`predicted` must hold whole-number labels, got 0.25\. Take `argmax\(dim=1\)`"
    ):
        GroupConfusion(2).update(torch.tensor([0.0, 0.25]), torch.tensor([0, 1]))


def test_one_group_is_named_as_one():
    with pytest.raises(ValueError, match="`group` must lie between 0 and 0, got 1: there is 1 group"):
        GroupConfusion(2).update(torch.tensor([0]), torch.tensor([0]), torch.tensor([1]))


def test_samples_of_an_unknown_group_are_left_out():
    metric = GroupConfusion(2, 2)
    metric.update(torch.tensor([0, 1, 0]), torch.tensor([0, 1, 1]), torch.tensor([-1, 1, -100]))
    assert metric.compute().tolist() == [[[0, 0], [0, 0]], [[0, 0], [0, 1]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.bool, torch.uint8])
def test_whole_numbers_of_other_types_are_labels(dtype):
    metric = GroupConfusion(2, 2)
    metric.update(torch.tensor([0, 1]), torch.tensor([0, 1]).to(dtype), torch.tensor([1, 0]).to(dtype))
    assert metric.compute().tolist() == [[[0, 0], [0, 1]], [[1, 0], [0, 0]]]


def test_lists_of_numbers_are_labels():
    metric = GroupConfusion(2, 2)
    metric.update(torch.tensor([0, 1]), [0.0, 1.0], (1, 0))
    assert metric.compute().tolist() == [[[0, 0], [0, 1]], [[1, 0], [0, 0]]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.5])
def test_numbers_that_are_not_whole_are_no_labels(bad):
    with pytest.raises(TypeError, match=f"`target` must hold whole-number labels, got {bad}"):
        GroupConfusion(2).update(torch.tensor([0, 1]), torch.tensor([0.0, bad]))
    with pytest.raises(TypeError, match=r"got torch\.complex64"):
        GroupConfusion(2).update(torch.tensor([0, 1]), torch.ones(2, dtype=torch.complex64))


@pytest.mark.parametrize(("labels", "got"), [(["a", "b"], "strings such as 'a'"), ("ab", "strings such as 'ab'")])
def test_names_in_place_of_numbers_raise(labels, got):
    with pytest.raises(
        TypeError, match=rf"`group`: expected integers, got {got}\. Number them, .*groups\.index\(name\)"
    ):
        GroupConfusion(2, 2).update(torch.tensor([0, 1]), torch.tensor([0, 1]), labels)


def test_what_is_no_list_raises():
    with pytest.raises(TypeError, match="`group`: expected integers, got dict"):
        GroupConfusion(2, 2).update(torch.tensor([0, 1]), torch.tensor([0, 1]), {"a": 1})


def test_empty_batch_counts_nothing():
    metric = GroupConfusion(2)
    metric.update(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long))
    assert metric.compute().sum() == 0


@pytest.mark.parametrize(("sizes", "message"), [((1, 1), "`num_classes` .* at least 2"), ((2, 0), "`num_groups` .* 1")])
def test_wrong_size_raises(sizes, message):
    with pytest.raises(ValueError, match=message):
        GroupConfusion(*sizes)
