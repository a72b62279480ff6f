"""The loss of the worst group: nothing else counts in a step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from losses._checks import REDUCTIONS, at_least, one_of
from losses.classification._base import ClassificationLoss, Weights
from losses.groups._per_group import GroupLosses, group_losses, weighted_group_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["WorstGroupLoss", "worst_group_loss"]


def worst_group_loss(
    logits: Tensor,
    target: Tensor,
    *,
    num_groups: int,
    group: Tensor | None = None,
    class_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    r"""Compute the largest mean cross entropy among the groups in the batch.

    .. math::
        L = \max_{g \text{ present}} \bar\ell_g, \qquad \bar\ell_g = \frac{1}{N_g} \sum_{n: g_n = g} s_n \ell_n

    with ``N_g`` the number of the group's samples, whatever their weights. The gradient flows through the worst group
    only (the first one of several), so training is noisy where groups are small; :class:`losses.GroupDROLoss` is the
    smooth form, and the better one to train with. As a measure of a validation batch it says what robust training is
    about. Costs as much as cross entropy; does not communicate.

    Args:
        logits: Unnormalised scores.
        target: Class indices, or class probabilities in the shape of ``logits``.
        num_groups: Number of groups.
        group: Group index of each sample; required.
        class_weight: Weight of each class, or of each class in each group; ``None`` means one.
        sample_weight: Weight of each sample, or of each sample and position; ``None`` means one.
        reduction: ``"mean"`` is the loss above, ``"none"`` the samples' values whose mean it is, ``"sum"`` their sum.
            The mean is over the samples that count.
        ignore_index: Class index that contributes neither loss nor count. A sample's loss is the mean over its
            positions that count. Unused with class probabilities.

    Shape:
        - logits: ``(samples, classes)`` or ``(samples, classes, positions...)``
        - target: ``(samples, positions...)`` integer, or the shape of ``logits`` floating
        - group: ``(samples,)`` integer
        - class_weight: ``(classes,)`` or ``(groups, classes)``
        - sample_weight: ``(samples,)`` or ``(samples, positions...)``
        - output: scalar, or ``(samples,)`` for ``reduction="none"``; in nats

    Raises:
        ValueError: If ``group`` is missing, a shape does not fit, or (checked on the CPU only) a class or group index
            is out of range.
        TypeError: If ``target`` or ``group`` has the wrong dtype.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]], requires_grad=True)
        >>> loss = worst_group_loss(logits, torch.tensor([0, 0]), group=torch.tensor([0, 1]), num_groups=2)
        >>> loss
        tensor(2.1269, grad_fn=<MulBackward0>)
        >>> loss.backward()
        >>> logits.grad.abs()
        tensor([[0.0000, 0.0000],
                [0.8808, 0.8808]])

    References:
        Sagawa et al., "Distributionally Robust Neural Networks for Group Shifts", ICLR 2020 (the objective).
    """
    one_of("reduction", reduction, REDUCTIONS)
    groups = group_losses(
        logits,
        target,
        at_least("num_groups", num_groups, 1),
        class_weight=class_weight,
        sample_weight=sample_weight,
        group=group,
        ignore_index=ignore_index,
    )
    return weighted_group_loss(groups, _worst(groups), reduction)


class WorstGroupLoss(ClassificationLoss):
    """Minimise the largest mean loss among the groups of a batch; see :func:`worst_group_loss`.

    With several processes, losses and counts are summed over them first, in training mode with gradients on; every
    process has to call the loss then. It is scaled so that gradients averaged over processes, as
    ``DistributedDataParallel`` does, are those of one process with all samples, and so is the averaged value: a process
    without a sample of the worst group returns zero. In evaluation mode, or without gradients, each process sees its
    own groups.

    Args:
        num_groups: Number of groups.
        class_weight: Initial class weights, by class or by group and class; ``None`` for a loss without.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        ignore_index: Class index that contributes neither loss nor count.
        process_group: Processes that share a batch; ``None`` means all, once torch.distributed is initialised.

    Shape:
        - class_weight: ``(classes,)`` or ``(num_groups, classes)``
        - forward: as :func:`worst_group_loss`

    Raises:
        ValueError: If an argument is out of its range or has the wrong shape.

    Example:
        >>> import torch
        >>> criterion = WorstGroupLoss(2)
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]], requires_grad=True)
        >>> loss = criterion(logits, torch.tensor([0, 0]), group=torch.tensor([0, 1]))
        >>> loss.backward()
        >>> loss
        tensor(2.1269, grad_fn=<MulBackward0>)
    """

    num_groups: int

    def __init__(
        self,
        num_groups: int,
        *,
        class_weight: Weights | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            None,
            class_weight,
            num_groups=at_least("num_groups", num_groups, 1),
            reduction=reduction,
            ignore_index=ignore_index,
        )
        self.process_group = process_group

    def _loss(self, logits: Tensor, target: Tensor, *, reduction: str = "mean", **common: Any) -> Tensor:
        groups = group_losses(
            logits, target, self.num_groups, local=not self.learning, process_group=self.process_group, **common
        )
        return weighted_group_loss(groups, _worst(groups), reduction)

    def _settings(self) -> list[str]:
        return []


def _worst(groups: GroupLosses) -> Tensor:
    """Return one for the present group with the largest mean loss, zero for the others, ``(groups,)``."""
    worst = torch.where(groups.present, groups.mean, -torch.inf).argmax(dim=0)
    return torch.arange(len(groups.mean), device=worst.device) == worst
