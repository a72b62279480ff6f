"""Callbacks for ``Trainer(callbacks=[...])``: one class a file."""

from __future__ import annotations

from attn_callbacks.callbacks.alignment_monitor import AlignmentMonitor
from attn_callbacks.callbacks.attention_heatmaps import AttentionHeatmaps
from attn_callbacks.callbacks.attention_paths import AttentionPaths
from attn_callbacks.callbacks.bias_monitor import BiasMonitor
from attn_callbacks.callbacks.error_analysis import ErrorAnalysis
from attn_callbacks.callbacks.head_importance import HeadImportance
from attn_callbacks.callbacks.head_roles import HeadRoles
from attn_callbacks.callbacks.head_statistics import HeadStatistics
from attn_callbacks.callbacks.training_health import TrainingHealth

__all__ = [
    "AlignmentMonitor",
    "AttentionHeatmaps",
    "AttentionPaths",
    "BiasMonitor",
    "ErrorAnalysis",
    "HeadImportance",
    "HeadRoles",
    "HeadStatistics",
    "TrainingHealth",
]
