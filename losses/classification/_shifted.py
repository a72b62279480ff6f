"""Cross entropy of scaled and shifted logits, in as few passes over the logits as plain cross entropy; the shift."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from losses._checks import REDUCTIONS, accumulation_dtype, check_shape, check_within, one_of
from losses.classification._per_sample import check_class_indices, check_logits, reduce, weigh_targets, weight_table

__all__ = ["one_per_class", "shift_of_adjustment", "shifted_classification_loss", "shifted_cross_entropy"]


def shift_of_adjustment(adjustment: Tensor, logits: Tensor, group: Tensor | None) -> Tensor:
    """Return what is added to the logits, in the dtype to compute in, after checking it.

    Args:
        adjustment: Shift of each class, or of each class in each group.
        logits: Unnormalised scores.
        group: Group index of each sample, needed for an ``adjustment`` with one row per group.

    Shape:
        - adjustment: ``(classes,)`` or ``(groups, classes)``
        - logits: ``(samples, classes, positions...)``
        - group: ``(samples,)``
        - output: ``(classes, 1...)``, or ``(samples, classes, 1...)`` by group

    Raises:
        ValueError: If a shape does not fit, ``adjustment`` has rows for groups but ``group`` is missing, or (checked on
            the CPU only) an adjustment is not finite, or a group index is out of range.
        TypeError: If ``group`` holds booleans or floating values.
    """
    by_group = isinstance(adjustment, Tensor) and adjustment.dim() == 2
    shift = adjustment if by_group else one_per_class("adjustment", adjustment, logits)
    largest = torch.finfo(shift.dtype).max
    check_within("adjustment", shift.detach(), -largest, largest, advice="`log_prior` is finite for every class.")
    return _rows_of_groups(adjustment, logits, group) if by_group else shift


def one_per_class(name: str, values: Tensor, logits: Tensor) -> Tensor:
    """Return one value per class as ``(classes, 1...)``, which adds to ``logits``, in the dtype to compute in."""
    check_logits(logits)
    check_shape(name, values, logits.shape[1:2], "(classes,)")
    return values.to(accumulation_dtype(logits)).reshape(-1, *[1] * (logits.dim() - 2))


def shifted_classification_loss(
    logits: Tensor,
    target: Tensor,
    *,
    scale: float = 1.0,
    shift: Tensor | None = None,
    margins: Tensor | None = None,
    class_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    group: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    """Return the weighted and reduced :func:`shifted_cross_entropy` of class indices.

    Args:
        logits: Unnormalised scores.
        target: Class indices.
        scale: Factor of the logits.
        shift: What is added after the scale, in the dtype to compute in; ``None`` means nothing.
        margins: What the score of each class is lowered by, before the scale, where it is the target.
        class_weight: Weight of each class, or of each class in each group; ``None`` means one.
        sample_weight: Weight of each sample, or of each sample and position; ``None`` means one.
        group: Group index of each sample.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        ignore_index: Class index that contributes neither loss nor count.

    Shape:
        - shift: broadcastable to ``logits``
        - margins: ``(classes,)``
        - others as in ``classification_loss``
    """
    one_of("reduction", reduction, REDUCTIONS)
    check_logits(logits)
    table = weight_table(class_weight, group, *logits.shape[:2])
    target = check_class_indices(logits, target, ignore_index)
    counted = target != ignore_index
    index = torch.where(counted, target, 0)
    dtype = accumulation_dtype(logits)
    margin = None if margins is None else margins.to(dtype)[index]
    losses = shifted_cross_entropy(logits.to(dtype), index, scale, shift, margin).masked_fill(~counted, 0.0)
    return reduce(weigh_targets(losses, target, counted, table), sample_weight, counted, reduction)


def shifted_cross_entropy(
    logits: Tensor, target: Tensor, scale: float = 1.0, shift: Tensor | None = None, margin: Tensor | None = None
) -> Tensor:
    r"""Return the cross entropy of :math:`s (z_n - m_n e_{y_n}) + a_n` for every sample and position.

    Composed of torch's functions, scale and shift would cost a quarter of the whole forward and backward each: every
    copy of the logits does. Here the backward pass keeps probabilities only, and scales one value per sample.

    Args:
        logits: Unnormalised scores, in the dtype to compute in.
        target: Class indices, all of them valid.
        scale: Factor of the logits.
        shift: What is added after the scale; ``None`` means nothing.
        margin: What the target's score is lowered by before the scale; ``None`` means nothing.

    Shape:
        - logits: ``(samples, classes, positions...)``
        - target, margin, output: ``(samples, positions...)``
        - shift: broadcastable to ``logits``
    """
    learned = any(part is not None and part.requires_grad for part in (shift, margin))
    if learned or torch.compiler.is_compiling():  # a compiler fuses the plain form by itself
        return F.cross_entropy(_plain_scores(logits, target, scale, shift, margin), target, reduction="none")
    losses: Tensor = _ShiftedCrossEntropy.apply(logits, target, scale, shift, margin)[0]  # type: ignore[no-untyped-call]
    return losses


def _rows_of_groups(table: Tensor, logits: Tensor, group: Tensor | None) -> Tensor:
    """Return the row of each sample's group as ``(samples, classes, 1...)``."""
    check_logits(logits)
    samples, classes = logits.shape[:2]
    check_shape("adjustment", table, (len(table), classes), "(groups, classes)")
    if group is None:
        raise ValueError(
            f"`adjustment` has one row for each of {len(table)} groups, but `group` is missing: pass `group=`, one "
            "group index per sample."
        )
    weight_table(None, group, samples, classes)  # checks `group`
    check_within("group", group, 0, len(table) - 1, advice="Groups are counted from 0.")
    rows = table.to(accumulation_dtype(logits)).index_select(0, group.long())  # indexing lets -1 wrap around on a GPU
    return rows.reshape(*rows.shape, *[1] * (logits.dim() - 2))


def _plain_scores(logits: Tensor, target: Tensor, scale: float, shift: Tensor | None, margin: Tensor | None) -> Tensor:
    if margin is not None:
        classes = torch.arange(logits.shape[1], device=logits.device).reshape(-1, *[1] * (logits.dim() - 2))
        logits = torch.where(classes == target.unsqueeze(1), logits - margin.unsqueeze(1), logits)
    return scale * logits if shift is None else scale * logits + shift


class _ShiftedCrossEntropy(torch.autograd.Function):
    """Losses and probabilities; the latter are an output so that the backward pass can itself be differentiated."""

    @staticmethod
    def forward(
        logits: Tensor, target: Tensor, scale: float, shift: Tensor | None, margin: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        index = target.unsqueeze(1)
        scores = logits * scale if shift is None else torch.add(shift, logits, alpha=scale)
        own = scores.gather(1, index)
        if margin is not None:
            own = own - scale * margin.unsqueeze(1)
            scores.scatter_(1, index, own)
        top = scores.amax(dim=1)
        probabilities = torch.softmax(scores, dim=1, out=scores)  # in place: one copy of the logits less
        losses = (top - own.squeeze(1)) - probabilities.amax(dim=1).log()
        return losses, probabilities

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, target, ctx.scale, *_ = inputs
        ctx.save_for_backward(target.unsqueeze(1), output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, None, None, None, None]:
        index, probabilities = ctx.saved_tensors
        of_losses, of_probabilities = (None if grad is None else ctx.scale * grad for grad in grad_outputs)
        grad: Tensor | None = None
        if of_losses is not None:
            slope = of_losses.unsqueeze(1)
            grad = (probabilities * slope).scatter_(1, index, (probabilities.gather(1, index) - 1) * slope)
        if of_probabilities is not None:  # in a second backward pass
            mean = (probabilities * of_probabilities).sum(dim=1, keepdim=True)
            through = probabilities * (of_probabilities - mean)
            grad = through if grad is None else grad + through
        return grad, None, None, None, None

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        logits: Tensor,
        target: Tensor,
        scale: float,
        shift: Tensor | None,
        margin: Tensor | None,
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        """Take the calls of ``torch.func.vmap`` for further samples: samples do not know of each other either."""

        def batched(value: Tensor, dim: int | None) -> Tensor:
            return value.expand(info.batch_size, *value.shape) if dim is None else value.movedim(dim, 0)

        logits, target = batched(logits, in_dims[0]), batched(target, in_dims[1])
        samples = logits.shape[:2]  # (calls, samples)
        if shift is not None:
            shift = batched(shift, in_dims[3])
            missing = [1] * (logits.dim() - shift.dim())
            shift = shift.reshape(len(shift), *missing, *shift.shape[1:]).expand(logits.shape).flatten(0, 1)
        if margin is not None:
            margin = batched(margin, in_dims[4]).flatten(0, 1)
        flat = logits.flatten(0, 1), target.flatten(0, 1)
        losses, probabilities = _ShiftedCrossEntropy.apply(*flat, scale, shift, margin)  # type: ignore[no-untyped-call]
        return (losses.unflatten(0, samples), probabilities.unflatten(0, samples)), (0, 0)
