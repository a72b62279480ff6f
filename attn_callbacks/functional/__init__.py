"""Pure functions over attention: statistics and importance of heads, mass on token sets, divergences. Torch only."""

from __future__ import annotations

from attn_callbacks.functional.alignment import AlignmentScores, alignment_counts, alignment_links, alignment_scores
from attn_callbacks.functional.alignment_shape import alignment_coverage, alignment_monotonicity, coverage_deviation
from attn_callbacks.functional.divergence import jensen_shannon, pairwise_jensen_shannon
from attn_callbacks.functional.effect_size import EffectSize, Moments, effect_size, moments
from attn_callbacks.functional.entropy import head_entropy
from attn_callbacks.functional.feature_importance import (
    attention_gradient_mass,
    received_attention,
    top_features,
    value_weighted_attention,
)
from attn_callbacks.functional.flow import attention_flow
from attn_callbacks.functional.head_distance import head_distance, head_drift
from attn_callbacks.functional.health import HealthAlert, HealthThresholds, health_alerts
from attn_callbacks.functional.importance import gate_gradient
from attn_callbacks.functional.map_patterns import offset_share, uniformity, vertical_mass
from attn_callbacks.functional.mass import attention_lift, attention_mass, target_share
from attn_callbacks.functional.paths import AttentionPath, top_paths
from attn_callbacks.functional.patterns import PatternScores, pattern_scores
from attn_callbacks.functional.relevance import (
    EncoderDecoderRelevance,
    attention_relevance,
    cross_relevance,
    encoder_decoder_relevance,
)
from attn_callbacks.functional.role_labels import ROLE_LABELS, RoleLabels, label_roles
from attn_callbacks.functional.roles import ROLES, head_roles
from attn_callbacks.functional.rollout import attention_rollout, gradient_rollout, gradient_weights
from attn_callbacks.functional.rows import row_mean, stratified_rows
from attn_callbacks.functional.statistics import STATISTICS, head_statistics
from attn_callbacks.functional.token_patterns import duplicate_pairs, induction_pairs
from attn_callbacks.functional.value_norms import layer_value_norms, value_norm_weights
from attn_callbacks.functional.vitals import head_vitals, pooled_vitals
from attn_callbacks.functional.words import WordMaps, word_maps

__all__ = [
    "ROLES",
    "ROLE_LABELS",
    "STATISTICS",
    "AlignmentScores",
    "AttentionPath",
    "EffectSize",
    "EncoderDecoderRelevance",
    "HealthAlert",
    "HealthThresholds",
    "Moments",
    "PatternScores",
    "RoleLabels",
    "WordMaps",
    "alignment_counts",
    "alignment_coverage",
    "alignment_links",
    "alignment_monotonicity",
    "alignment_scores",
    "attention_flow",
    "attention_gradient_mass",
    "attention_lift",
    "attention_mass",
    "attention_relevance",
    "attention_rollout",
    "coverage_deviation",
    "cross_relevance",
    "duplicate_pairs",
    "effect_size",
    "encoder_decoder_relevance",
    "gate_gradient",
    "gradient_rollout",
    "gradient_weights",
    "head_distance",
    "head_drift",
    "head_entropy",
    "head_roles",
    "head_statistics",
    "head_vitals",
    "health_alerts",
    "induction_pairs",
    "jensen_shannon",
    "label_roles",
    "layer_value_norms",
    "moments",
    "offset_share",
    "pairwise_jensen_shannon",
    "pattern_scores",
    "pooled_vitals",
    "received_attention",
    "row_mean",
    "stratified_rows",
    "target_share",
    "top_features",
    "top_paths",
    "uniformity",
    "value_norm_weights",
    "value_weighted_attention",
    "vertical_mass",
    "word_maps",
]
