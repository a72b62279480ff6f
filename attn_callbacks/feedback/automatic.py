"""The feedback that a module and its data have the means for."""

from __future__ import annotations

from torch import Tensor, nn

from attn_callbacks.feedback.attention_guidance import AttentionGuidance
from attn_callbacks.feedback.base import Feedback
from attn_callbacks.feedback.class_reweighting import ClassReweighting
from attn_callbacks.feedback.criterion import BUFFER, SHIFT
from attn_callbacks.feedback.mask_randomization import MaskRandomization
from attn_callbacks.feedback.resampling import Resampling

__all__ = ["automatic_feedback"]

_GENTLE = 0.1
"""Strength that attention guidance begins with; it rises while validation shows that more is wanted."""


def automatic_feedback(module: nn.Module) -> tuple[Feedback, ...]:
    """Choose feedback for a module.

    - Every loss in it with a buffer ``adjustment`` (``losses.LogitAdjustedLoss``) or ``class_weight``
      (``losses.WeightedCrossEntropyLoss``) gets :class:`~attn_callbacks.feedback.ClassReweighting`: as margins where it
      can, by group where the shifts, or else the weights, have groups.
    - :class:`~attn_callbacks.feedback.MaskRandomization` for batches that mark ``spurious``, from the first step on:
      somebody has said that it must not decide, and what is learned first is hard to unlearn.
    - :class:`~attn_callbacks.feedback.AttentionGuidance`, for batches that mark ``spurious`` or ``relevance``, from the
      first report on with a finding of groups or attention. Reliance is left to counter-examples: where it can be
      measured they can be made, and guidance beside them made groups worse.
    - :class:`~attn_callbacks.feedback.Resampling` by group, for training data with a ``DynamicDistributedSampler`` that
      knows groups: from the first step on where groups tell classes there. The monitor then leaves the weights of
      classes and groups alone. Without such a sampler, or where a loss starts with weights or margins that correct
      classes already, it leaves this out.

    For a further loss pass a list, with ``InputGradientPenalty(...)`` in it.

    Args:
        module: The training module.

    Example:
        >>> from losses import LogitAdjustedLoss
        >>> module = nn.Module()
        >>> module.criterion = LogitAdjustedLoss([90, 10])
        >>> [type(feedback).__name__ for feedback in automatic_feedback(module)]
        ['ClassReweighting', 'Resampling', 'MaskRandomization', 'AttentionGuidance']
    """
    found: list[Feedback] = []
    for path, part in module.named_modules():
        buffers = dict(part.named_buffers(recurse=False))
        if path and SHIFT in buffers:
            found.append(ClassReweighting(path, _by(buffers[SHIFT]), act="margin"))
        elif path and BUFFER in buffers:
            found.append(ClassReweighting(path, _by(buffers[BUFFER])))
    guidance = AttentionGuidance(coefficient=_GENTLE, when="unmeasured")
    return (*found, Resampling("group"), MaskRandomization(when="always"), guidance)


def _by(table: Tensor) -> str:
    return "group" if table.dim() == 2 else "class"
