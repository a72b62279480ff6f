"""What the ensemble losses share: the members' logits in one tensor, their mean prediction, the weight of a sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from losses._checks import accumulation_dtype, check_shape, check_tensor
from losses.classification._per_sample import classification_loss

__all__ = ["counted_targets", "loss_weights", "mean_log_probabilities", "stack_members"]


def stack_members(logits: Tensor | Sequence[Tensor]) -> Tensor:
    """Return the logits of all members in one tensor, after checking that they go together.

    Shape:
        - logits: ``(members, samples, classes, positions...)``, or ``(samples, classes, positions...)`` each
        - output: ``(members, samples, classes, positions...)``

    Raises:
        ValueError: If there is no member, or a shape does not fit.
        TypeError: If a member's logits are no tensor.
    """
    if not isinstance(logits, Tensor):
        members = list(logits)
        for index, member in enumerate(members):
            check_tensor(f"logits[{index}]", member)
            check_shape(f"logits[{index}]", member, members[0].shape, "of `logits[0]`")
        logits = torch.stack(members) if members else torch.empty(0)
    if logits.dim() < 3 or logits.shape[0] == 0:
        raise ValueError(
            "`logits` must hold the logits of at least one member, (members, samples, classes, positions...), got "
            f"shape {tuple(logits.shape)}. Stack what the members return."
        )
    return logits


def mean_log_probabilities(logits: Tensor) -> Tensor:
    """Return the logarithm of the members' mean probabilities, without leaving the logarithm.

    Shape:
        - logits: ``(members, samples, classes, positions...)``
        - output: ``(samples, classes, positions...)``, float32 for half precision
    """
    scores = F.log_softmax(logits, dim=2, dtype=accumulation_dtype(logits))
    lowest = torch.finfo(scores.dtype).min
    # where every member rules a class out, the gradient of the sum would be NaN
    return scores.clamp(min=lowest).logsumexp(dim=0) - math.log(logits.shape[0])


def loss_weights(scores: Tensor, target: Tensor, **common: Any) -> Tensor:
    """Return what the weights make of a loss of one: class times sample weight, zero where the target is ignored.

    Read off a uniform prediction, whose cross entropy is the logarithm of the number of classes times that.

    Args:
        scores: Tells samples and classes; its values are not used.
        target: As for the classification losses.
        common: Arguments of the classification losses, except ``reduction``.

    Shape:
        - scores: ``(samples, classes, positions...)``
        - output: ``(samples, positions...)``
    """
    even = torch.zeros_like(scores, dtype=accumulation_dtype(scores), requires_grad=False)
    return classification_loss(even, target, reduction="none", **common) / math.log(max(scores.shape[1], 2))


def counted_targets(target: Tensor, ignore_index: int) -> Tensor | None:
    """Return which samples (and positions) a mean counts; ``None`` for class probabilities, which all count."""
    return None if target.is_floating_point() else target != ignore_index
