"""Ours: the bias monitor with feedback, and the control that its guidance of attention has to beat."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

import losses
from attn_callbacks import BatchSchema, BiasMonitor
from attn_callbacks.feedback import (
    AttentionGuidance,
    DynamicDistributedSampler,
    Feedback,
    MaskRandomization,
    RandomRationaleControl,
)
from benchmarks.debias.baselines import counts
from benchmarks.debias.classifier import Classifier
from benchmarks.debias.method import Method, trained
from benchmarks.debias.work import Splits, Work

__all__ = ["OURS"]


def attention(work: Work, splits: Splits, steps: int, seed: int) -> nn.Module:
    """Guide attention alone."""
    return _monitored(work, splits, steps, seed, [AttentionGuidance()])


def random_rationale(work: Work, splits: Splits, steps: int, seed: int) -> nn.Module:
    """Guide attention by random tokens, as many as are annotated: the control of `attention`."""
    return _monitored(work, splits, steps, seed, [RandomRationaleControl(AttentionGuidance(), seed=seed)])


def attention_and_functional(work: Work, splits: Splits, steps: int, seed: int) -> nn.Module:
    """Guide attention, and randomise what is spurious."""
    return _monitored(work, splits, steps, seed, [MaskRandomization(when="always"), AttentionGuidance()])


def automatic(work: Work, splits: Splits, steps: int, seed: int) -> nn.Module:
    """Let the monitor decide what to do."""
    return _monitored(work, splits, steps, seed, "automatic")


class Steered(Classifier):
    """Weights are by the groups that the monitor reports."""

    group_part = "group"


def _monitored(work: Work, splits: Splits, steps: int, seed: int, feedback: Sequence[Feedback] | str) -> nn.Module:
    schema = BatchSchema(spurious="spurious_pixels" if "spurious_pixels" in splits.train.parts else None)
    monitor = BiasMonitor(schema, feedback=feedback, classes=work.classes, groups=work.groups)
    sampler = DynamicDistributedSampler(splits.train.labels, groups=splits.train.group, seed=seed)
    criterion = _criterion(work, splits)
    return trained(work, splits, steps, kind=Steered, criterion=criterion, callbacks=[monitor], sampler=sampler)


def _criterion(work: Work, splits: Splits) -> nn.Module:
    """Return cross entropy that can be steered: weights by class and group, or margins by class."""
    if work.groups:
        return losses.WeightedCrossEntropyLoss(len(work.classes), num_groups=len(work.groups))
    return losses.LogitAdjustedLoss(counts(work, splits.train))


OURS = (
    Method("random-rationale", random_rationale),
    Method("ours-attention", attention),
    Method("ours-attention+functional", attention_and_functional),
    Method("ours", automatic),
)
