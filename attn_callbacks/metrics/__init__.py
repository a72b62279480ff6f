"""Accumulators over `attn_callbacks.functional`: constant memory, exact across processes. Needs torchmetrics."""

from __future__ import annotations

from attn_callbacks.metrics.confusion import GroupConfusion
from attn_callbacks.metrics.importance import HeadImportance, HeadImportanceResult
from attn_callbacks.metrics.mass import ClassMass, ClassMassResult
from attn_callbacks.metrics.statistics import HeadStatisticsMetric, HeadStatisticsResult

__all__ = [
    "ClassMass",
    "ClassMassResult",
    "GroupConfusion",
    "HeadImportance",
    "HeadImportanceResult",
    "HeadStatisticsMetric",
    "HeadStatisticsResult",
]
