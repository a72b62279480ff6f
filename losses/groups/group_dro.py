"""Group distributionally robust optimisation: groups with a high loss gain weight step by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from losses._checks import (
    REDUCTIONS,
    at_least,
    check_shape,
    check_tensor,
    check_weight_values,
    check_weights,
    in_range,
    one_of,
)
from losses.classification._base import ClassificationLoss, Weights
from losses.groups._per_group import GroupLosses, group_losses, weighted_group_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["GroupDROLoss", "group_dro_loss"]


def group_dro_loss(
    logits: Tensor,
    target: Tensor,
    *,
    group_weight: Tensor,
    group: Tensor | None = None,
    class_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    r"""Compute the sum of the groups' mean cross entropies, each times the weight of its group.

    .. math::
        L = \sum_g q_g \bar\ell_g, \qquad \bar\ell_g = \frac{1}{N_g} \sum_{n: g_n = g} s_n \ell_n

    with ``N_g`` the number of the group's samples, whatever their weights. A group without a sample in the batch adds
    nothing; the others are not scaled up for it. :class:`GroupDROLoss` finds the weights. Costs as much as cross
    entropy; does not communicate.

    Args:
        logits: Unnormalised scores.
        target: Class indices, or class probabilities in the shape of ``logits``.
        group_weight: Weight ``q`` of each group, not negative; no gradient flows to it.
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
        - group_weight: ``(groups,)``
        - group: ``(samples,)`` integer
        - class_weight: ``(classes,)`` or ``(groups, classes)``
        - sample_weight: ``(samples,)`` or ``(samples, positions...)``
        - output: scalar, or ``(samples,)`` for ``reduction="none"``; in nats

    Raises:
        ValueError: If ``group`` is missing, a shape does not fit, or (checked on the CPU only) a class or group index
            is out of range, or a group weight is negative or not finite.
        TypeError: If ``group_weight`` is no tensor, or ``target`` or ``group`` has the wrong dtype.

    Example:
        >>> import torch
        >>> logits = torch.zeros(3, 2, requires_grad=True)
        >>> group = torch.tensor([0, 0, 1])
        >>> loss = group_dro_loss(logits, torch.tensor([0, 1, 1]), group=group, group_weight=torch.tensor([0.2, 0.8]))
        >>> loss
        tensor(0.6931, grad_fn=<MulBackward0>)
        >>> loss.backward()
        >>> logits.grad
        tensor([[-0.0500,  0.0500],
                [ 0.0500, -0.0500],
                [ 0.4000, -0.4000]])

    References:
        Sagawa et al., "Distributionally Robust Neural Networks for Group Shifts", ICLR 2020, Algorithm 1.
    """
    one_of("reduction", reduction, REDUCTIONS)
    check_tensor("group_weight", group_weight)
    check_shape("group_weight", group_weight, group_weight.shape[:1], "(groups,)")
    check_weights("group_weight", group_weight)
    groups = group_losses(
        logits,
        target,
        len(group_weight),
        class_weight=class_weight,
        sample_weight=sample_weight,
        group=group,
        ignore_index=ignore_index,
    )
    return weighted_group_loss(groups, group_weight.detach(), reduction)


class GroupDROLoss(ClassificationLoss):
    r"""Minimise the loss of the worst group, with weights that follow the losses; see :func:`group_dro_loss`.

    In training mode, with gradients on, every call first moves the weights of the groups in its batch, then uses them:

    .. math::
        q_g \leftarrow m \, \frac{q_g \exp(\eta (\bar\ell_g + C / \sqrt{n_g}))}
        {\sum_{h \text{ present}} q_h \exp(\eta (\bar\ell_h + C / \sqrt{n_h}))}, \qquad m = \sum_{h \text{ present}} q_h

    Groups that are not in the batch keep their weight exactly; published code takes their loss for zero, so that rare
    groups lose their weight. A batch of one group therefore changes nothing: mix groups in a batch. Weights also stay
    where a loss is not finite. They live in the buffer ``group_weight``, changed in place and part of the state dict.
    Keep the loss outside activation checkpointing: a forward pass that runs again would move them twice.

    Needs strong regularisation or early stopping: a network that fits its training data has no worst group. Label noise
    draws weight to itself. Under gradient accumulation every micro-batch moves the weights.

    With several processes, losses and counts are summed over them first, where weights move; every process has to call
    the loss then. It is scaled so that gradients averaged over processes, as ``DistributedDataParallel`` does, are
    those of one process with all samples, and so is the averaged value. In evaluation mode, or without gradients, each
    process sees its own.

    Args:
        num_groups: Number of groups.
        step_size: How fast weights follow the losses, :math:`\eta`.
        group_counts: Number of training samples in each group, :math:`n_g`; only ``adjustment`` needs it.
        adjustment: Strength ``C`` of the generalisation adjustment, which adds weight to small groups. It enters the
            update of the weights only, never the loss.
        class_weight: Initial class weights, by class or by group and class; ``None`` for a loss without.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        ignore_index: Class index that contributes neither loss nor count.
        process_group: Processes that share a batch; ``None`` means all, once torch.distributed is initialised.

    Shape:
        - group_counts: ``(num_groups,)``
        - class_weight: ``(classes,)`` or ``(num_groups, classes)``
        - forward: as :func:`group_dro_loss`

    Raises:
        ValueError: If an argument is out of its range, has the wrong shape, or ``adjustment`` lacks ``group_counts``.

    Example:
        >>> import torch
        >>> criterion = GroupDROLoss(2, step_size=1.0)
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]], requires_grad=True)
        >>> loss = criterion(logits, torch.tensor([0, 0]), group=torch.tensor([0, 1]))
        >>> criterion.group_weight
        tensor([0.1192, 0.8808])
        >>> loss.backward()
        >>> loss
        tensor(1.8885, grad_fn=<MulBackward0>)

    References:
        Sagawa et al., "Distributionally Robust Neural Networks for Group Shifts", ICLR 2020, Algorithm 1;
        section 3.3 for the adjustment.
    """

    num_groups: int
    group_weight: Tensor
    group_adjustment: Tensor

    def __init__(
        self,
        num_groups: int,
        step_size: float = 0.01,
        *,
        group_counts: Tensor | Sequence[float] | None = None,
        adjustment: float = 0.0,
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
        self.step_size = in_range("step_size", step_size, 0)
        self.adjustment = in_range("adjustment", adjustment, 0)
        self.group_counts = None if group_counts is None else torch.as_tensor(group_counts).tolist()
        self.process_group = process_group
        self.register_buffer("group_weight", torch.full((num_groups,), 1 / num_groups))
        self.register_buffer("group_adjustment", self._adjustments(), persistent=False)

    def _loss(self, logits: Tensor, target: Tensor, *, reduction: str = "mean", **common: Any) -> Tensor:
        groups = group_losses(
            logits, target, self.num_groups, local=not self.learning, process_group=self.process_group, **common
        )
        if self.learning:
            self._move_weights(groups)
        return weighted_group_loss(groups, self.group_weight, reduction)

    @torch.no_grad()
    def _move_weights(self, groups: GroupLosses) -> None:
        weight = self.group_weight.to(groups.mean.dtype)
        gain = self.step_size * (groups.mean + self.group_adjustment)
        self.group_weight.copy_(_follow(weight, gain, groups.present))

    def _adjustments(self) -> Tensor:
        """Return what the adjustment adds to the loss of each group, ``(groups,)``."""
        if self.group_counts is None:
            if self.adjustment > 0:
                raise ValueError("`adjustment` needs `group_counts`: pass the number of training samples per group.")
            return torch.zeros(self.num_groups)
        counts = torch.tensor(self.group_counts, dtype=torch.float32)
        check_shape("group_counts", counts, (self.num_groups,), "(num_groups,)")
        check_weight_values("group_counts", counts)
        return self.adjustment / counts.clamp(min=1).sqrt()

    def _settings(self) -> list[str]:
        counts = [] if self.group_counts is None else [f"group_counts={self.group_counts}"]
        return [f"step_size={self.step_size}", *counts, f"adjustment={self.adjustment}"]


def _follow(weight: Tensor, gain: Tensor, present: Tensor) -> Tensor:
    """Return the weights times ``exp(gain)``, normalised within the present groups; absent ones keep theirs.

    Args:
        weight: Weight of each group, which sum to one.
        gain: Logarithm of the factor of each group; where one of a present group is not finite, all weights stay.
        present: ``True`` for groups in the batch.

    Shape:
        - weight, gain, present, output: ``(groups,)``
    """
    smallest = torch.finfo(weight.dtype).tiny
    score = weight.clamp(min=smallest).log() + gain  # a weight that underflowed to zero could never return
    share = torch.where(present, score, -torch.inf).softmax(dim=0)
    mass = torch.where(present, weight, 0.0).sum() / weight.sum()  # takes back what rounding adds up over the steps
    steady = (present & ~gain.isfinite()).any()
    return torch.where(present & ~steady, mass * share, weight)
