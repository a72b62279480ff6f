"""Ours: the bias monitor with feedback, and the control that its guidance of attention has to beat."""

from __future__ import annotations

from collections.abc import Sequence

import torch
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
from benchmarks.debias.work import Samples, Splits, Work

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
    """Let the monitor decide what to do, with the means that the work gives it."""
    return _monitored(work, splits, steps, seed, "automatic")


class Steered(Classifier):
    """Weights are by the groups that the monitor reports."""

    group_part = "group"


class SteeredWithin(Classifier):
    """Margins of classes are within what groups are made of."""

    group_part = "attribute"


def _monitored(work: Work, splits: Splits, steps: int, seed: int, feedback: Sequence[Feedback] | str) -> nn.Module:
    schema = BatchSchema(spurious="spurious_pixels" if "spurious_pixels" in splits.train.parts else None)
    if work.attribute:
        splits = Splits(*(_with_attribute(work, part) for part in splits))
        schema = BatchSchema(group="attribute")
    monitor = BiasMonitor(
        schema, feedback=feedback, classes=work.classes, groups=() if work.attribute else work.groups, min_support=10
    )
    sampler = DynamicDistributedSampler(splits.train.labels, groups=splits.train.group, seed=seed)
    return trained(
        work,
        splits,
        steps,
        kind=SteeredWithin if work.attribute else Steered,
        criterion=_criterion(work, splits),
        callbacks=[monitor],
        sampler=sampler if work.remedy == "sampler" else None,
    )


def _with_attribute(work: Work, samples: Samples | None) -> Samples | None:
    if samples is None or samples.group is None:
        return samples
    return samples.replaced(attribute=samples.group % work.attribute)


def _criterion(work: Work, splits: Splits) -> nn.Module:
    """Return a loss that can be steered: by weights of classes and groups, or by margins."""
    if work.attribute:
        cells = splits.train.parts["attribute"] * len(work.classes) + splits.train.labels
        table = torch.bincount(cells, minlength=work.attribute * len(work.classes))
        return losses.LogitAdjustedLoss(table.view(work.attribute, len(work.classes)))
    if work.groups:
        return losses.WeightedCrossEntropyLoss(len(work.classes), num_groups=len(work.groups))
    if work.remedy == "weights":
        return losses.FocalLoss(class_weight=torch.ones(len(work.classes)))
    return losses.LogitAdjustedLoss(counts(work, splits.train))


OURS = (
    Method("random-rationale", random_rationale),
    Method("ours-attention", attention),
    Method("ours-attention+functional", attention_and_functional),
    Method("ours", automatic),
)
