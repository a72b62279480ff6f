r"""What all classification losses share: from logits and targets to the loss of every sample, and to one number.

One sample, or one position of a sample, costs
:math:`-s_n \sum_c w_{g_n, c} \, t_{n, c} \, f(p_{n, c}) \log p_{n, c}`; ``f`` is 1 for cross entropy.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from losses._checks import (
    REDUCTIONS,
    ROUNDING,
    accumulation_dtype,
    check_shape,
    check_tensor,
    check_weights,
    check_within,
    in_range,
    one_of,
)

__all__ = ["check_class_indices", "check_logits", "classification_loss", "reduce", "weigh_targets", "weight_table"]

Modulation = Callable[[Tensor], Tensor]


def classification_loss(
    logits: Tensor,
    target: Tensor,
    *,
    class_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    group: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    modulate: Modulation | None = None,
) -> Tensor:
    """Return the weighted and reduced loss.

    Args:
        logits: Unnormalised scores.
        target: Class indices, or class probabilities in the shape of ``logits``.
        class_weight: Weight of each class, or of each class in each group; ``None`` means one.
        sample_weight: Weight of each sample, or of each sample and position; ``None`` means one.
        group: Group index of each sample.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        ignore_index: Class index that contributes neither loss nor count.
        label_smoothing: Share of the target that is spread evenly over all classes.
        modulate: Factor ``f`` as a function of log-probabilities, elementwise; ``None`` means one.

    Shape:
        - logits: ``(samples, classes, positions...)``
        - target: ``(samples, positions...)`` integer, or the shape of ``logits`` floating
        - class_weight: ``(classes,)`` or ``(groups, classes)``
        - sample_weight: ``(samples,)`` or ``(samples, positions...)``
        - group: ``(samples,)`` integer
        - output: scalar, or ``(samples, positions...)`` for ``reduction="none"``

    Raises:
        ValueError: If a shape does not fit, an argument is out of its range, ``class_weight`` has rows for groups but
            ``group`` is missing, or (checked on the CPU only) an index is out of range.
        TypeError: If ``target`` or ``group`` has the wrong dtype.
    """
    one_of("reduction", reduction, REDUCTIONS)
    in_range("label_smoothing", label_smoothing, 0, 1)
    check_logits(logits)
    check_tensor("target", target)
    table = weight_table(class_weight, group, *logits.shape[:2])
    scores = F.log_softmax(logits, dim=1, dtype=accumulation_dtype(logits))
    if target.is_floating_point():
        check_shape("target", target, logits.shape, "of `logits`")
        advice = "Floating targets are class probabilities."
        check_within("target", target.detach(), 0, 1, advice=advice, slack=ROUNDING)
        if label_smoothing > 0:
            target = (1 - label_smoothing) * target.to(scores.dtype) + label_smoothing / logits.shape[1]
        losses, counted = _soft_losses(scores, target, table, modulate), None
    else:
        losses, counted = _hard_losses(scores, target, table, ignore_index, modulate)
        if label_smoothing > 0:
            even = scores.new_tensor(1 / logits.shape[1]).expand_as(scores)
            spread = _soft_losses(scores, even, table, modulate).masked_fill(~counted, 0.0)
            losses = (1 - label_smoothing) * losses + label_smoothing * spread
    return reduce(losses, sample_weight, counted, reduction)


def reduce(losses: Tensor, sample_weight: Tensor | None, counted: Tensor | None, reduction: str) -> Tensor:
    """Weigh the losses by sample, and reduce them; the mean is over what counts, whatever the weights.

    Args:
        losses: Loss of every sample (and position).
        sample_weight: Weight of each sample, or of each sample and position; ``None`` means one.
        counted: ``True`` for what the mean counts; ``None`` means everything. What is not counted must be zero already.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Shape:
        - losses, counted: ``(samples, positions...)``
        - sample_weight: ``(samples,)`` or ``(samples, positions...)``
        - output: scalar, or ``(samples, positions...)`` for ``reduction="none"``

    Raises:
        ValueError: If ``sample_weight`` has another shape.
    """
    if sample_weight is not None:
        losses = losses * _sample_weight(sample_weight, losses).to(losses.dtype)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    count = losses.numel() if counted is None else counted.sum()
    return losses.sum() / torch.as_tensor(count, dtype=losses.dtype, device=losses.device).clamp(min=1)


def check_logits(logits: Tensor) -> None:
    """Raise unless ``logits`` has the shape ``(samples, classes, positions...)``."""
    if not isinstance(logits, Tensor) or logits.dim() < 2:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"`logits` must be a tensor of shape (samples, classes, positions...), got {got}.")
    if not logits.is_floating_point():
        raise TypeError(f"`logits` must be floating scores before the softmax, got {logits.dtype}.")


def check_class_indices(logits: Tensor, target: Tensor, ignore_index: int = -100) -> Tensor:
    """Return ``target`` as int64, after checking that it holds class indices for ``logits``.

    Raises:
        ValueError: If the shape does not fit or (checked on the CPU only) an index is out of range.
        TypeError: If ``target`` holds booleans or floating values.
    """
    samples, classes = logits.shape[:2]
    if isinstance(target, Tensor) and (target.dtype == torch.bool or target.is_floating_point()):
        raise TypeError(f"`target` must hold integer class indices, got {target.dtype}.")
    check_shape("target", target, (samples, *logits.shape[2:]), "(samples, positions...)")
    target = target.long()
    advice = f"Count classes from 0, and mark what to leave out by `ignore_index`, {ignore_index}."
    check_within("target", target, 0, classes - 1, skip=ignore_index, advice=advice)
    return target


def weight_table(class_weight: Tensor | None, group: Tensor | None, samples: int, classes: int) -> Tensor | None:
    """Return the weights of each sample, ``(samples or 1, classes)``, or ``None`` for no weights.

    Raises:
        ValueError: If a shape does not fit, ``class_weight`` has rows for groups but ``group`` is missing, or (checked
            on the CPU only) a group index is out of range.
        TypeError: If ``group`` holds booleans or floating values.
    """
    if group is not None:
        check_shape("group", group, (samples,), "(samples,)")
        if group.is_floating_point() or group.dtype == torch.bool:
            raise TypeError(f"`group` must hold integer group indices, got {group.dtype}.")
    if class_weight is None:
        return None
    check_tensor("class_weight", class_weight, "Pass `torch.tensor(...)`, on the device of `logits`.")
    check_weights("class_weight", class_weight)
    if class_weight.dim() < 2:
        check_shape("class_weight", class_weight, (classes,), "(classes,)")
        return class_weight.unsqueeze(0)
    check_shape("class_weight", class_weight, (*class_weight.shape[:1], classes), "(groups, classes)")
    if group is None:
        raise ValueError(
            f"`class_weight` has one row for each of {class_weight.shape[0]} groups, but `group` is missing: pass "
            "`group=`, one group index per sample."
        )
    check_within("group", group, 0, class_weight.shape[0] - 1, advice="Groups are counted from 0.")
    return class_weight.index_select(0, group.long())  # indexing would let a negative group wrap around on a GPU


def weigh_targets(losses: Tensor, target: Tensor, counted: Tensor, table: Tensor | None) -> Tensor:
    """Multiply each loss by the weight of its target class.

    Args:
        losses: Loss of every sample (and position); zero where it does not count.
        target: Class indices.
        counted: ``False`` where ``target`` is to be ignored.
        table: What :func:`weight_table` returned.

    Shape:
        - losses, target, counted, output: ``(samples, positions...)``
    """
    if table is None:
        return losses
    index = torch.where(counted, target, 0).reshape(len(target), math.prod(target.shape[1:]))
    weight = table.expand(len(target), -1).gather(1, index).reshape(target.shape)
    return losses * weight.to(losses.dtype)


def _hard_losses(
    scores: Tensor, target: Tensor, table: Tensor | None, ignore_index: int, modulate: Modulation | None
) -> tuple[Tensor, Tensor]:
    """Return the loss of every sample and position, and which of them count, both ``(samples, positions...)``."""
    target = check_class_indices(scores, target, ignore_index)
    counted = target != ignore_index
    losses = F.nll_loss(scores, target, reduction="none", ignore_index=ignore_index)
    if modulate is not None:
        losses = losses * modulate(-losses)
    return weigh_targets(losses, target, counted, table), counted


def _soft_losses(scores: Tensor, target: Tensor, table: Tensor | None, modulate: Modulation | None) -> Tensor:
    """Return the loss of every sample and position, ``(samples, positions...)``."""
    weighted = target.to(scores.dtype)
    if table is not None:
        weighted = weighted * table.to(scores.dtype).reshape(*table.shape, *[1] * (scores.dim() - 2))
    scores = scores.masked_fill(target == 0, 0.0)  # a logit of -inf and a probability of 0 would give 0 * inf
    if modulate is not None:
        weighted = weighted * modulate(scores)
    return -(weighted * scores).sum(dim=1)


def _sample_weight(sample_weight: Tensor, losses: Tensor) -> Tensor:
    """Return the weights in a shape that multiplies ``losses``."""
    check_tensor("sample_weight", sample_weight, "Pass `torch.tensor(...)`, on the device of `logits`.")
    check_weights("sample_weight", sample_weight)
    if sample_weight.dim() == losses.dim():
        check_shape("sample_weight", sample_weight, losses.shape, "(samples, positions...)")
        return sample_weight
    check_shape("sample_weight", sample_weight, losses.shape[:1], "(samples,)")
    return sample_weight.reshape(-1, *[1] * (losses.dim() - 1))
