"""Calibration and loss by group and class against torchmetrics and against a loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchmetrics.classification import MulticlassCalibrationError

from attn_callbacks.metrics.calibration import GroupCalibration, expected_calibration_error, mean_loss
from tests.metrics.merging import reduced
from tests.metrics.test_no_wait import assert_updated_in_place, layout


def random_batch(seed: int, samples: int = 200, classes: int = 4, groups: int = 3) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(samples, classes, generator=generator, dtype=torch.float64)
    target = torch.where(
        torch.rand(samples, generator=generator) < 0.6,
        logits.argmax(dim=1),
        torch.randint(classes, (samples,), generator=generator),
    )
    group = torch.randint(groups, (samples,), generator=generator)
    return logits, target, group


def loop_error(logits: np.ndarray, target: np.ndarray, bins: int) -> float:
    """Expected calibration error of a few samples, one bin after the other."""
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = odds / odds.sum(axis=1, keepdims=True)
    confidence, hit = probabilities.max(axis=1), probabilities.argmax(axis=1) == target
    error = 0.0
    for b in range(bins):
        inside = (confidence >= b / bins) & (confidence < (b + 1) / bins if b < bins - 1 else confidence <= 1.1)
        if inside.any():
            error += inside.mean() * abs(hit[inside].mean() - confidence[inside].mean())
    return error


def test_overall_error_matches_torchmetrics():
    ours, theirs = GroupCalibration(4, 3), MulticlassCalibrationError(4, n_bins=15, norm="l1")
    for seed in range(3):
        logits, target, group = random_batch(seed)
        ours.update(logits, target, group)
        theirs.update(logits.softmax(dim=1), target)
    error = expected_calibration_error(ours.compute().bins)
    assert 0.1 < error.item() < 0.4
    assert error.item() == pytest.approx(theirs.compute().item(), rel=1e-6)


@pytest.mark.parametrize("by", ["cell", "class", "group", "all"])
def test_error_of_every_part_matches_a_loop(by):
    metric = GroupCalibration(4, 3, bins=10)
    batches = [random_batch(seed) for seed in range(3)]
    for batch in batches:
        metric.update(*batch)
    logits, target, group = (torch.cat(parts).numpy() for parts in zip(*batches, strict=True))
    parts = {
        "cell": [[(group == g) & (target == c) for c in range(4)] for g in range(3)],
        "class": [target == c for c in range(4)],
        "group": [group == g for g in range(3)],
        "all": target >= 0,
    }[by]
    parts = np.array(parts)
    result, losses = metric.compute()
    error, (mean, deviation) = expected_calibration_error(result, by), mean_loss(result, losses, by)
    assert error.shape == mean.shape == deviation.shape == parts.shape[:-1]
    loss = F.cross_entropy(torch.tensor(logits), torch.tensor(target), reduction="none").numpy()
    for place in np.ndindex(parts.shape[:-1]):
        own = parts[place]
        assert error[place].item() == pytest.approx(loop_error(logits[own], target[own], 10))
        assert mean[place].item() == pytest.approx(loss[own].mean())
        assert deviation[place].item() == pytest.approx(loss[own].std(ddof=1) / np.sqrt(own.sum()))


@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
def test_one_logit_is_a_binary_classifier(shape):
    generator = torch.Generator().manual_seed(0)
    score, target = torch.randn(300, generator=generator).double(), torch.randint(2, (300,), generator=generator)
    metric = GroupCalibration(2)
    metric.update(score.reshape(shape), target)
    bins, loss = metric.compute()
    logits = torch.stack([torch.zeros_like(score), score], dim=1)
    assert expected_calibration_error(bins).item() == pytest.approx(loop_error(logits.numpy(), target.numpy(), 15))
    assert mean_loss(bins, loss)[0].item() == pytest.approx(
        F.binary_cross_entropy_with_logits(score, target.double()).item()
    )


def test_confidence_on_an_edge_belongs_to_the_bin_above_and_one_to_the_last():
    metric = GroupCalibration(2, bins=4)
    metric.update(torch.tensor([[0.0, 0.0], [1000.0, 0.0]]), torch.tensor([0, 0]))
    assert metric.compute().bins[0, 0].tolist() == [[0, 0, 0], [0, 0, 0], [1, 0.5, 1], [1, 1, 1]]


def test_absent_groups_keep_their_number_and_nothing_is_nan():
    metric = GroupCalibration(2, 3)
    metric.update(torch.tensor([[0.0, 1.0]]), torch.tensor([1]), torch.tensor([2]))
    bins, loss = metric.compute()
    assert bins[..., 0].sum(dim=-1).tolist() == [[0, 0], [0, 0], [0, 1]]
    assert expected_calibration_error(bins, "group").isnan().tolist() == [True, True, False]
    mean, error = mean_loss(bins, loss, "group")
    assert mean.isnan().tolist() == [True, True, False]
    assert error.isnan().all()


def test_ignored_and_broken_samples_do_not_count():
    logits = torch.tensor([[0.0, 1.0], [torch.nan, 1.0], [torch.inf, 1.0], [0.0, 1.0], [0.0, -torch.inf]])
    metric = GroupCalibration(3)  # of which the model has two
    metric.update(logits, torch.tensor([1, 0, 1, -100, 1]), torch.tensor([0, 0, 0, 9, 0]))
    bins, loss = metric.compute()
    assert bins[..., 0].sum() == 1
    assert loss.isfinite().all()
    assert mean_loss(bins, loss)[0].item() == pytest.approx(np.log(1 + np.exp(-1)))


def test_two_processes_equal_one_on_the_union():
    halves, union = (GroupCalibration(4, 3), GroupCalibration(4, 3)), GroupCalibration(4, 3)
    for k in range(4):
        halves[k % 2].update(*random_batch(k))
        union.update(*random_batch(k))
    torch.testing.assert_close(tuple(reduced(*halves).compute()), tuple(union.compute()), rtol=1e-13, atol=0)


def test_update_reads_no_value_off_the_cpu():
    labels = torch.ones(4, dtype=torch.long, device="meta")
    metric = GroupCalibration(3, 2).to("meta")
    assert_updated_in_place(metric, torch.ones(4, 3, device="meta", dtype=torch.bfloat16), labels, labels)
    assert layout(metric)["bins"] == ("meta", torch.float64, (2, 3, 15, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logits": torch.ones(2, 4)}, r"`logits` .* at most 3 classes, got \(2, 4\)"),
        ({"logits": torch.ones(2, 3, 1)}, r"`logits` must have shape \(samples, classes\)"),
        ({"target": torch.tensor([0, 3])}, "`target` must lie between 0 and 2, got 3"),
        ({"group": torch.tensor([0, 2])}, "`group` must lie between 0 and 1, got 2: there are 2 groups"),
        ({"group": torch.tensor([0])}, r"`group` must have shape \(samples,\) = \(2,\), got \(1,\)"),
    ],
)
def test_wrong_update_raises(arguments, message):
    batch = {"logits": torch.zeros(2, 3), "target": torch.tensor([0, 1]), **arguments}
    with pytest.raises(ValueError, match=message):
        GroupCalibration(3, 2).update(**batch)


def test_samples_of_an_unknown_group_are_left_out():
    every, known = GroupCalibration(3, 2), GroupCalibration(3, 2)
    logits = torch.arange(9.0).view(3, 3).sin()
    every.update(logits, torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1, -1, 0]))
    known.update(logits[[0, 2]], torch.tensor([0, 2]), torch.tensor([1, 0]))
    torch.testing.assert_close(tuple(every.compute()), tuple(known.compute()))


def test_wrong_part_and_sizes_raise():
    with pytest.raises(ValueError, match="`by` must be one of 'cell', 'class', 'group', 'all', got 'classes'"):
        expected_calibration_error(torch.zeros(1, 2, 3, 3), by="classes")
    for sizes, name in (((1, 1), "num_classes"), ((2, 0), "num_groups"), ((2, 1, 0), "bins")):
        with pytest.raises(ValueError, match=f"`{name}` must be at least"):
            GroupCalibration(*sizes)
