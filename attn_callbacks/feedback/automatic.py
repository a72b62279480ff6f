"""The feedback that a module and its data have the means for."""

from __future__ import annotations

from torch import nn

from attn_callbacks.feedback.attention_guidance import AttentionGuidance
from attn_callbacks.feedback.base import Feedback
from attn_callbacks.feedback.class_reweighting import ClassReweighting
from attn_callbacks.feedback.criterion import BUFFER, SHIFT
from attn_callbacks.feedback.mask_randomization import MaskRandomization

__all__ = ["automatic_feedback"]


def automatic_feedback(module: nn.Module) -> tuple[Feedback, ...]:
    """Choose feedback for a module; what changes training steps waits for a report with a finding of its kind.

    - Every loss in it with a buffer ``adjustment`` (``losses.LogitAdjustedLoss``) or ``class_weight``
      (``losses.WeightedCrossEntropyLoss``) gets :class:`~attn_callbacks.feedback.ClassReweighting`: as margins where it
      can, by group where the weights have groups.
    - :class:`~attn_callbacks.feedback.MaskRandomization` and :class:`~attn_callbacks.feedback.AttentionGuidance`, for
      batches that mark ``spurious`` or ``relevance``.

    For a sampler or a further loss pass a list, with ``Resampling()`` or ``InputGradientPenalty(...)`` in it.

    Args:
        module: The training module.

    Example:
        >>> from losses import LogitAdjustedLoss
        >>> module = nn.Module()
        >>> module.criterion = LogitAdjustedLoss([90, 10])
        >>> [type(feedback).__name__ for feedback in automatic_feedback(module)]
        ['ClassReweighting', 'MaskRandomization', 'AttentionGuidance']
    """
    found: list[Feedback] = []
    for path, part in module.named_modules():
        buffers = dict(part.named_buffers(recurse=False))
        if path and SHIFT in buffers:
            found.append(ClassReweighting(path, act="margin"))
        elif path and BUFFER in buffers:
            found.append(ClassReweighting(path, by="group" if buffers[BUFFER].dim() == 2 else "class"))
    return (*found, MaskRandomization(when="biased"), AttentionGuidance(when="biased"))
