"""Losses on attention weights: where attention should go, how sharp it should be, how heads should differ."""

from __future__ import annotations

from losses.attention.guidance import AttentionGuidedLoss, attention_guidance

__all__ = ["AttentionGuidedLoss", "attention_guidance"]
