"""What is a finding and what is chance, and which feedback answers which kind."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor

from attn_callbacks.bias.corrections import holm

__all__ = ["ANSWERS", "DEAD_BAND", "LEVEL_OF_CHANCE", "amount", "beyond_chance", "called", "share_of"]

DEAD_BAND = 0.02
"""Sizes up to this are left alone, however sure."""

LEVEL_OF_CHANCE = 0.05
"""Probability up to which one false finding among all comparisons of a family is accepted."""

ANSWERS = {
    "class": ("ClassReweighting", "Resampling"),
    # never weights by class alone: ClassReweighting(by="group") has one a class and group
    "group": ("Resampling", "GroupReweighting", 'ClassReweighting(by="group")'),
    "feature": (
        *("MaskRandomization", "InputGradientPenalty", "AdversarialTraining"),
        *("AttentionGuidance", "FeatureRegularization", "EnsembleFeedback"),
    ),
    "attention": ("AttentionGuidance",),
}
"""Feedback by kind of finding, the first choice first."""


def beyond_chance(size: Tensor, p_values: Tensor, comparisons: int = 0) -> tuple[Tensor, list[tuple[int, ...]]]:
    """Judge a family of comparisons.

    Args:
        size: What is missing in each; NaN was not measured.
        p_values: Its probability by chance, in the same shape; NaN for what is not compared.
        comparisons: How many were made in all, where these are the strongest of more.

    Returns:
        The corrected p-values, and the index of each finding.
    """
    corrected = holm(p_values, comparisons)
    indices = ((size > DEAD_BAND) & (corrected < LEVEL_OF_CHANCE)).nonzero()
    return corrected, [tuple(index) for index in indices.tolist()]


def called(what: str, name: str) -> str:
    """Say what a name is of, unless it says so itself: "group indoors", but "group 1"."""
    says = re.match(rf"{what}(?![a-z])", name, re.IGNORECASE)
    return name if says else f"{what} {name}"


def amount(size: float | Tensor, interval: Sequence[float] | Tensor) -> str:
    """Write a size with its interval."""
    low, high = (float(bound) for bound in interval)
    return f"{float(size):.2f} (95 % interval {low:.2f} to {high:.2f})"


def share_of(part: int | float | Tensor, whole: str = "") -> str:
    """Write a share of 1 in per cent; small ones with a digit more."""
    percent = 100 * float(part)
    return f"{percent:.1f} %{whole}" if percent < 10 else f"{percent:.0f} %{whole}"
