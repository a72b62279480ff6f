"""What holds for every loss of class indices, whatever the shapes, the ignored positions and the weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from losses import (
    BalancedSoftmaxLoss,
    ClassBalancedLoss,
    FocalLoss,
    LDAMLoss,
    LogitAdjustedLoss,
    SeesawLoss,
    WeightedCrossEntropyLoss,
)

IGNORED = 255


def counts(classes: int) -> list[int]:
    return [3 ** (classes - label) for label in range(classes)]


LOSSES: dict[str, Callable[[int, str], nn.Module]] = {
    "WeightedCrossEntropyLoss": lambda classes, reduction: WeightedCrossEntropyLoss(
        classes, [1.0 + label for label in range(classes)], reduction=reduction, ignore_index=IGNORED
    ),
    "FocalLoss": lambda classes, reduction: FocalLoss(reduction=reduction, ignore_index=IGNORED),
    "ClassBalancedLoss": lambda classes, reduction: ClassBalancedLoss(
        counts(classes), 0.9, reduction=reduction, ignore_index=IGNORED
    ),
    "LDAMLoss": lambda classes, reduction: LDAMLoss(
        counts(classes), scale=3.0, reduction=reduction, ignore_index=IGNORED
    ),
    "LogitAdjustedLoss": lambda classes, reduction: LogitAdjustedLoss(
        counts(classes), reduction=reduction, ignore_index=IGNORED
    ),
    "BalancedSoftmaxLoss": lambda classes, reduction: BalancedSoftmaxLoss(
        counts(classes), reduction=reduction, ignore_index=IGNORED
    ),
    "SeesawLoss": lambda classes, reduction: SeesawLoss(classes, reduction=reduction, ignore_index=IGNORED).eval(),
}

every = pytest.mark.parametrize("build", LOSSES.values(), ids=LOSSES)
shapes = given(
    samples=st.integers(1, 6),
    classes=st.integers(2, 5),
    positions=st.sampled_from([(), (3,), (2, 2)]),
    seed=st.integers(0, 999),
)
few = settings(max_examples=25, deadline=None, derandomize=True)


def draw(samples: int, classes: int, positions: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(samples, classes, *positions, generator=generator)
    target = torch.randint(classes, (samples, *positions), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.3] = IGNORED
    return logits, target


@every
@few
@shapes
def test_reductions_agree(build, samples, classes, positions, seed):
    logits, target = draw(samples, classes, positions, seed)
    none, mean, total = (build(classes, reduction)(logits, target) for reduction in ("none", "mean", "sum"))
    assert none.shape == target.shape
    assert none[target == IGNORED].eq(0).all()
    torch.testing.assert_close(total, none.sum())
    torch.testing.assert_close(mean, none.sum() / max(1, int((target != IGNORED).sum())))


@every
@few
@shapes
def test_every_position_is_a_sample_of_its_own(build, samples, classes, positions, seed):
    """What is ignored may as well not be there, and the order does not matter."""
    logits, target = draw(samples, classes, positions, seed)
    flat, labels = logits.movedim(1, -1).reshape(-1, classes), target.reshape(-1)
    kept = (labels != IGNORED).nonzero()[:, 0].flip(0)
    alone = build(classes, "none")(flat[kept], labels[kept])
    torch.testing.assert_close(build(classes, "none")(logits, target).reshape(-1)[kept], alone)


@every
@few
@shapes
def test_sample_weights_are_factors(build, samples, classes, positions, seed):
    logits, target = draw(samples, classes, positions, seed)
    weight = torch.rand(target.shape, generator=torch.Generator().manual_seed(seed))
    weighted = build(classes, "none")(logits, target, sample_weight=weight)
    torch.testing.assert_close(weighted, weight * build(classes, "none")(logits, target))


@every
@few
@shapes
def test_class_weights_of_groups_are_factors(build, samples, classes, positions, seed):
    logits, target = draw(samples, classes, positions, seed)
    generator = torch.Generator().manual_seed(seed)
    table, group = torch.rand(3, classes, generator=generator), torch.randint(3, (samples,), generator=generator)
    weighted = build(classes, "none")(logits, target, class_weight=table, group=group)
    plain = build(classes, "none")(logits, target, class_weight=torch.ones(classes))
    rows = group.reshape(-1, *[1] * len(positions)).expand_as(target)
    torch.testing.assert_close(weighted, plain * table[rows, target.clamp(max=classes - 1)])


@every
@few
@shapes
def test_a_constant_added_to_all_logits_changes_nothing(build, samples, classes, positions, seed):
    logits, target = draw(samples, classes, positions, seed)
    torch.testing.assert_close(build(classes, "mean")(logits + 7, target), build(classes, "mean")(logits, target))
