"""Whether sampling and loss correct the same imbalance twice in a run."""

from __future__ import annotations

from typing import Any

from torch import nn

from attn_callbacks.bias import BiasReport
from attn_callbacks.feedback import DynamicDistributedSampler, double_correction

__all__ = ["corrected_twice"]


def corrected_twice(sampler: Any, module: nn.Module, report: BiasReport) -> str | None:
    """Say which cell sampling, weights and margins lift together beyond balance; ``None``: none.

    Args:
        sampler: What draws the training data.
        module: The module with its losses.
        report: Knows the names.
    """
    if not isinstance(sampler, DynamicDistributedSampler):
        return None
    groups, classes = sampler.shares.shape
    if classes != len(report.class_names):
        return None
    names = report.group_names if groups == len(report.group_names) and groups > 1 else None
    tables = [dict(part.named_buffers(recurse=False)) for part in module.modules()]
    for table in tables:
        weights, shift = table.get("class_weight"), table.get("adjustment")
        found = [each for each in (weights, shift) if each is not None]
        if found and all(tuple(each.shape) in ((classes,), (groups, classes)) for each in found):
            told = double_correction(
                sampler.natural_shares, sampler.shares, weights, shift, classes=report.class_names, groups=names
            )
            if told is not None:
                return told
    return None
