"""What a bias monitor takes as feedback, and what it names for others to monitor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from attn_callbacks.bias import BiasReport
from attn_callbacks.feedback import Feedback

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = ["MONITORED", "feedback_list", "is_sharded", "monitored"]

_ALWAYS = ("accuracy", "gap", "worst_class_recall")
MONITORED = (*_ALWAYS, "worst_group_accuracy", "worst_cell_recall")
"""Figures of a report that models are selected by."""


def feedback_list(feedback: Any) -> tuple[Feedback, ...]:
    """Return a list of feedback as a tuple.

    Raises:
        TypeError: If it is something else.
    """
    if isinstance(feedback, str):
        raise TypeError(f'`feedback` must be a list of feedback, or "automatic", got {feedback!r}.')
    if isinstance(feedback, Feedback):
        raise TypeError(f"`feedback` must be a list, got {feedback!r}. Pass [{feedback!r}].")
    for entry in feedback:
        if not isinstance(entry, Feedback):
            raise TypeError(
                f"`feedback` must hold feedback such as `ClassReweighting()` or `AttentionGuidance()`, got {entry!r}."
            )
    return tuple(feedback)


def is_sharded(trainer: Trainer) -> bool:
    """Say whether parameters are spread over processes, so that all have to run the network as often as the others."""
    return type(trainer.strategy).__name__ in {"FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"}


def monitored(report: BiasReport) -> Mapping[str, float]:
    """Return what models are selected by; without groups, nothing about them."""
    names = MONITORED if report.has_groups else _ALWAYS
    return {name: float(getattr(report, name)) for name in names}
