"""Losses on attention weights: where attention should go, how sharp it should be, how heads should differ."""

from __future__ import annotations

from losses.attention.alignment import GuidedAlignmentLoss, guided_alignment
from losses.attention.consistency import AttentionConsistencyLoss, attention_consistency
from losses.attention.disagreement import HeadDisagreementLoss, head_disagreement
from losses.attention.entropy import AttentionEntropyLoss, attention_entropy
from losses.attention.guidance import AttentionGuidedLoss, attention_guidance
from losses.attention.sparsity import AttentionSparsityLoss, attention_sparsity
from losses.attention.suppression import AttentionSuppressionLoss, attention_suppression

__all__ = [
    "AttentionConsistencyLoss",
    "AttentionEntropyLoss",
    "AttentionGuidedLoss",
    "AttentionSparsityLoss",
    "AttentionSuppressionLoss",
    "GuidedAlignmentLoss",
    "HeadDisagreementLoss",
    "attention_consistency",
    "attention_entropy",
    "attention_guidance",
    "attention_sparsity",
    "attention_suppression",
    "guided_alignment",
    "head_disagreement",
]
