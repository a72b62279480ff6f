"""Losses that a training step calls and a feedback callback steers. Torch only, importable alone.

Each family is a pair in one file: a pure function and the ``nn.Module`` that calls it. Every loss accumulates in
float32 under mixed precision, and ``reduction="mean"`` divides by a number of samples, never by a sum of weights.
"""

from __future__ import annotations

from losses.attention import AttentionGuidedLoss, attention_guidance
from losses.classification import WeightedCrossEntropyLoss, weighted_cross_entropy

__all__ = ["AttentionGuidedLoss", "WeightedCrossEntropyLoss", "attention_guidance", "weighted_cross_entropy"]
