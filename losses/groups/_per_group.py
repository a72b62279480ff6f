"""What the losses over groups share: the loss of every sample, and of every group over all processes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from losses._checks import check_within
from losses._distributed import process_count, sum_over_processes
from losses.classification._per_sample import classification_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["GroupLosses", "group_losses", "sample_losses", "weighted_group_loss"]


class GroupLosses(NamedTuple):
    """What a batch says about the groups.

    Shape:
        - samples, group: ``(samples,)``, those of this process
        - mean, size: ``(groups,)``, detached, over all processes; the mean of an absent group is zero
    """

    samples: Tensor
    group: Tensor
    mean: Tensor
    size: Tensor
    processes: int

    @property
    def present(self) -> Tensor:
        """``True`` for groups with a sample that counts."""
        return self.size > 0


def group_losses(
    logits: Tensor,
    target: Tensor,
    num_groups: int,
    *,
    class_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    group: Tensor | None = None,
    ignore_index: int = -100,
    local: bool = True,
    process_group: ProcessGroup | None = None,
) -> GroupLosses:
    """Return the loss of every sample and of every group; the arguments are those of the public functions.

    Args:
        logits: Unnormalised scores.
        target: Class indices, or class probabilities.
        num_groups: Number of groups.
        class_weight: Weight of each class, or of each class in each group.
        sample_weight: Weight of each sample, or of each sample and position.
        group: Group index of each sample.
        ignore_index: Class index that contributes neither loss nor count.
        local: Leave other processes alone; else every process has to call this.
        process_group: Processes to add up; ``None`` means all of them.

    Raises:
        ValueError: If ``group`` is missing, or as the public functions say.
    """
    if group is None:
        raise ValueError("`group` is missing: pass `group=`, one group index per sample.")
    losses, counted = sample_losses(
        logits, target, class_weight=class_weight, sample_weight=sample_weight, group=group, ignore_index=ignore_index
    )
    check_within("group", group, 0, num_groups - 1)
    group = group.long()
    with torch.no_grad():
        values = torch.stack([losses.detach(), counted.to(losses.dtype)])  # (2, samples)
        sums = values.new_zeros(2, num_groups).index_add(1, group, values)
        if not local:
            sums = sum_over_processes(sums, process_group)
        mean = sums[0] / sums[1].clamp(min=1)
    return GroupLosses(losses, group, mean, sums[1], 1 if local else process_count(process_group))


def weighted_group_loss(groups: GroupLosses, weight: Tensor, reduction: str) -> Tensor:
    """Return the sum of the groups' mean losses, each times its weight, scaled for the average over processes.

    Args:
        groups: What :func:`group_losses` returned.
        weight: Weight of each group; may change before the backward pass.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Shape:
        - weight: ``(groups,)``
        - output: scalar, or ``(samples,)`` for ``reduction="none"``
    """
    share = weight.to(groups.samples.dtype) / groups.size.clamp(min=1)  # a copy, which backward needs
    losses = groups.samples * share.index_select(0, groups.group)
    if reduction == "mean":
        return losses.sum() * groups.processes
    losses = losses * groups.size.sum()
    return losses.sum() if reduction == "sum" else losses


def sample_losses(
    logits: Tensor,
    target: Tensor,
    *,
    class_weight: Tensor | None,
    sample_weight: Tensor | None,
    group: Tensor | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Return each sample's mean loss over its positions that count, and whether any does, both ``(samples,)``."""
    losses = classification_loss(
        logits,
        target,
        class_weight=class_weight,
        sample_weight=sample_weight,
        group=group,
        reduction="none",
        ignore_index=ignore_index,
    )
    counted = torch.ones_like(losses, dtype=torch.bool) if target.is_floating_point() else target != ignore_index
    flat = (losses.shape[0], math.prod(losses.shape[1:]))
    count = counted.reshape(flat).sum(dim=1)
    return losses.reshape(flat).sum(dim=1) / count.clamp(min=1), count > 0
