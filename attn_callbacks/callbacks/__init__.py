"""Callbacks for ``Trainer(callbacks=[...])``: one class a file."""

from __future__ import annotations

from attn_callbacks.callbacks.attention_heatmaps import AttentionHeatmaps
from attn_callbacks.callbacks.bias_monitor import BiasMonitor
from attn_callbacks.callbacks.head_statistics import HeadStatistics

__all__ = ["AttentionHeatmaps", "BiasMonitor", "HeadStatistics"]
