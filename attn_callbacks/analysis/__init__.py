"""Experiments on a model: which heads matter, which do the same, which tokens decide. Frozen results."""

from __future__ import annotations

from attn_callbacks.analysis.ablation import HeadAblation, ablate_heads
from attn_callbacks.analysis.attention_gradient import attention_gradients
from attn_callbacks.analysis.clusters import HeadClusters, RedundantPair, cluster_heads
from attn_callbacks.analysis.feature_importance import FeatureImportance, feature_importance
from attn_callbacks.analysis.head_distances import head_distances
from attn_callbacks.analysis.head_importance import GateImportance, head_importance
from attn_callbacks.analysis.interaction import HeadInteractions, HeadPair, head_interactions
from attn_callbacks.analysis.pattern_probe import AttentionPatternProbe, PatternProbeResult, ProbedHead
from attn_callbacks.analysis.pruning import PruningCurve, RemovableHeads, pruning_curve
from attn_callbacks.analysis.shapley import HeadShapley, head_shapley

__all__ = [
    "AttentionPatternProbe",
    "FeatureImportance",
    "GateImportance",
    "HeadAblation",
    "HeadClusters",
    "HeadInteractions",
    "HeadPair",
    "HeadShapley",
    "PatternProbeResult",
    "ProbedHead",
    "PruningCurve",
    "RedundantPair",
    "RemovableHeads",
    "ablate_heads",
    "attention_gradients",
    "cluster_heads",
    "feature_importance",
    "head_distances",
    "head_importance",
    "head_interactions",
    "head_shapley",
    "pruning_curve",
]
