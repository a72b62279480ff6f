"""Cross entropy whose class weights may change between any two steps, by class or by class and group."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losses._checks import REDUCTIONS, accumulation_dtype, check_shape, check_weight_values, check_within, one_of

__all__ = ["WeightedCrossEntropyLoss", "weighted_cross_entropy"]


def weighted_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    class_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    group: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    r"""Compute cross entropy with weights by class, by class and group, and by sample.

    .. math::
        \ell_n = -s_n \sum_c w_{g_n, c} \, t_{n, c} \log \operatorname{softmax}(z_n)_c, \qquad
        L = \frac{1}{N} \sum_n \ell_n

    with ``N`` the number of samples (and positions) that are not ignored. Unlike ``F.cross_entropy(weight=...)``, the
    mean does not divide by the batch's sum of weights: a batch of one keeps its weight, and the mean over micro-batches
    of equal size is the mean over the whole batch. Under autocast and in half precision the sum runs in float32.

    Args:
        logits: Unnormalised scores.
        target: Class indices, or class probabilities in the shape of ``logits``.
        class_weight: Weight of each class, or of each class in each group; ``None`` means one. Values are not checked
            here, since that would wait for the device in every step.
        sample_weight: Weight of each sample, or of each sample and position; ``None`` means one.
        group: Group index of each sample. Picks the row of a ``class_weight`` with one row per group, else unused.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        ignore_index: Class index that contributes neither loss nor count. Unused with class probabilities.

    Shape:
        - logits: ``(samples, classes)`` or ``(samples, classes, positions...)``
        - target: ``(samples, positions...)`` integer, or the shape of ``logits`` floating
        - class_weight: ``(classes,)`` or ``(groups, classes)``
        - sample_weight: ``(samples,)`` or ``(samples, positions...)``
        - group: ``(samples,)`` integer
        - output: scalar, or ``(samples, positions...)`` for ``reduction="none"``; in nats

    Raises:
        ValueError: If a shape does not fit, ``class_weight`` has rows for groups but ``group`` is missing, or (checked
            on the CPU only) a class or group index is out of range.
        TypeError: If ``target`` or ``group`` has the wrong dtype.

    Example:
        >>> logits = torch.zeros(2, 2, requires_grad=True)
        >>> loss = weighted_cross_entropy(logits, torch.tensor([0, 1]), class_weight=torch.tensor([1.0, 3.0]))
        >>> loss
        tensor(1.3863, grad_fn=<DivBackward0>)
        >>> loss.backward()
        >>> logits.grad
        tensor([[-0.2500,  0.2500],
                [ 0.7500, -0.7500]])

    References:
        Byrd and Lipton, "What is the Effect of Importance Weighting in Deep Learning?", ICML 2019: weights fade once
        the training loss reaches zero, so combine them with early stopping or regularisation.
    """
    one_of("reduction", reduction, REDUCTIONS)
    if logits.dim() < 2:
        raise ValueError(f"`logits` must have shape (samples, classes, positions...), got {tuple(logits.shape)}.")
    samples, classes = logits.shape[:2]
    table = _weight_table(class_weight, group, samples, classes)
    scores = F.log_softmax(logits, dim=1, dtype=accumulation_dtype(logits))
    if target.is_floating_point():
        check_shape("target", target, logits.shape, "of `logits`")
        losses, counted = _soft_losses(scores, target, table), None
    else:
        losses, counted = _hard_losses(scores, target, table, ignore_index)
    if sample_weight is not None:
        losses = losses * _sample_weight(sample_weight, losses).to(losses.dtype)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    count = losses.numel() if counted is None else counted.sum()
    return losses.sum() / torch.as_tensor(count, dtype=losses.dtype, device=losses.device).clamp(min=1)


class WeightedCrossEntropyLoss(nn.Module):
    """Cross entropy with class weights that can be set during training; see :func:`weighted_cross_entropy`.

    The weights live in the buffer ``class_weight``, which :meth:`set_class_weight` changes in place: a compiled step is
    not compiled again, and distributed copies stay valid. The buffer is not part of the state dict, so checkpoints move
    freely between this loss and a plain ``nn.CrossEntropyLoss``; whoever sets the weights keeps them.

    Args:
        num_classes: Number of classes.
        weight: Initial weights; ``None`` means one everywhere. Weights by class are repeated for every group.
        num_groups: Number of groups with weights of their own; ``None`` keeps one weight per class.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        ignore_index: Class index that contributes neither loss nor count.

    Shape:
        - weight: ``(num_classes,)`` or ``(num_groups, num_classes)``
        - forward: as :func:`weighted_cross_entropy`

    Raises:
        ValueError: If a count is below one, or ``weight`` has the wrong shape or a negative or non-finite value.

    Example:
        >>> criterion = WeightedCrossEntropyLoss(3)
        >>> criterion.set_class_weight([1.0, 2.0, 0.5])
        >>> logits = torch.zeros(1, 3, requires_grad=True)
        >>> loss = criterion(logits, torch.tensor([1]))
        >>> loss.backward()
        >>> loss
        tensor(2.1972, grad_fn=<DivBackward0>)
    """

    class_weight: Tensor

    def __init__(
        self,
        num_classes: int,
        weight: Tensor | Sequence[float] | Sequence[Sequence[float]] | None = None,
        *,
        num_groups: int | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        for name, count in (("num_classes", num_classes), ("num_groups", 1 if num_groups is None else num_groups)):
            if count < 1:
                raise ValueError(f"`{name}` must be at least 1, got {count}.")
        self.num_classes = num_classes
        self.num_groups = num_groups
        self.reduction = one_of("reduction", reduction, REDUCTIONS)
        self.ignore_index = ignore_index
        shape = (num_classes,) if num_groups is None else (num_groups, num_classes)
        self.register_buffer("class_weight", torch.ones(shape), persistent=False)
        if weight is not None:
            self.set_class_weight(weight)

    @torch.no_grad()
    def set_class_weight(self, weight: Tensor | Sequence[float] | Sequence[Sequence[float]]) -> None:
        """Replace the weights in place, after checking them.

        Args:
            weight: New weights; weights by class are repeated for every group.

        Shape:
            - weight: ``(num_classes,)``, or ``(num_groups, num_classes)`` where the loss has groups

        Raises:
            ValueError: If the shape does not fit, or a weight is negative or not finite.
        """
        new = torch.as_tensor(weight, dtype=self.class_weight.dtype, device=self.class_weight.device)
        if tuple(new.shape) not in {(self.num_classes,), tuple(self.class_weight.shape)}:
            expected = tuple(self.class_weight.shape)
            raise ValueError(f"`weight` must have shape {expected}, got {tuple(new.shape)}.")
        check_weight_values("weight", new)
        self.class_weight.copy_(new)

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        *,
        class_weight: Tensor | None = None,
        sample_weight: Tensor | None = None,
        group: Tensor | None = None,
    ) -> Tensor:
        """Return the loss; a ``class_weight`` given here replaces the buffer for this call."""
        return weighted_cross_entropy(
            logits,
            target,
            class_weight=self.class_weight if class_weight is None else class_weight,
            sample_weight=sample_weight,
            group=group,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
        )

    def extra_repr(self) -> str:
        """Show how to build the loss again, weights aside."""
        parts = [str(self.num_classes)]
        parts += [] if self.num_groups is None else [f"num_groups={self.num_groups}"]
        return ", ".join([*parts, f"reduction={self.reduction!r}", f"ignore_index={self.ignore_index}"])


def _weight_table(class_weight: Tensor | None, group: Tensor | None, samples: int, classes: int) -> Tensor | None:
    """Return the weights of each sample, ``(samples or 1, classes)``, or ``None`` for no weights."""
    if group is not None:
        check_shape("group", group, (samples,), "(samples,)")
        if group.is_floating_point() or group.dtype == torch.bool:
            raise TypeError(f"`group` must hold integer group indices, got {group.dtype}.")
    if class_weight is None:
        return None
    if class_weight.dim() == 1:
        check_shape("class_weight", class_weight, (classes,), "(classes,)")
        return class_weight.unsqueeze(0)
    check_shape("class_weight", class_weight, (*class_weight.shape[:1], classes), "(groups, classes)")
    if group is None:
        raise ValueError(
            f"`class_weight` has one row for each of {class_weight.shape[0]} groups, but `group` is missing: pass "
            "`group=`, one group index per sample."
        )
    check_within("group", group, 0, class_weight.shape[0] - 1)
    return class_weight.index_select(0, group)  # indexing would let a negative group wrap around on a GPU


def _hard_losses(scores: Tensor, target: Tensor, table: Tensor | None, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Return the loss of every sample and position, and which of them count, both ``(samples, positions...)``."""
    samples, classes = scores.shape[:2]
    check_shape("target", target, (samples, *scores.shape[2:]), "(samples, positions...)")
    if target.dtype == torch.bool:
        raise TypeError("`target` must hold integer class indices or floating class probabilities, got torch.bool.")
    target = target.long()
    check_within("target", target, 0, classes - 1, skip=ignore_index)
    counted = target != ignore_index
    losses = F.nll_loss(scores, target, reduction="none", ignore_index=ignore_index)
    if table is None:
        return losses, counted
    index = torch.where(counted, target, 0).reshape(samples, math.prod(target.shape[1:]))
    weight = table.expand(samples, classes).gather(1, index).reshape(target.shape)
    return losses * weight.to(losses.dtype), counted


def _soft_losses(scores: Tensor, target: Tensor, table: Tensor | None) -> Tensor:
    """Return the loss of every sample and position, ``(samples, positions...)``."""
    weighted = target.to(scores.dtype)
    if table is not None:
        weighted = weighted * table.to(scores.dtype).reshape(*table.shape, *[1] * (scores.dim() - 2))
    # a class ruled out by a logit of -inf and a probability of 0 would give 0 * inf
    return -(weighted * scores.masked_fill(target == 0, 0.0)).sum(dim=1)


def _sample_weight(sample_weight: Tensor, losses: Tensor) -> Tensor:
    """Return the weights in a shape that multiplies ``losses``."""
    if sample_weight.dim() == losses.dim():
        check_shape("sample_weight", sample_weight, losses.shape, "(samples, positions...)")
        return sample_weight
    check_shape("sample_weight", sample_weight, losses.shape[:1], "(samples,)")
    return sample_weight.reshape(-1, *[1] * (losses.dim() - 1))
