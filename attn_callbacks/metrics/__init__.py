"""Accumulators over `attn_callbacks.functional`: constant memory, exact across processes. Needs torchmetrics."""

from __future__ import annotations

from attn_callbacks.metrics.alignment import AlignmentMetric, AlignmentResult
from attn_callbacks.metrics.association import TokenAssociation, TokenSums
from attn_callbacks.metrics.calibration import CalibrationResult, GroupCalibration
from attn_callbacks.metrics.candidates import Associations, associations
from attn_callbacks.metrics.class_attention import ClassAttention, ClassAttentionResult, class_divergence
from attn_callbacks.metrics.confusion import GroupConfusion
from attn_callbacks.metrics.head_distance import HeadDistance, HeadDistanceResult
from attn_callbacks.metrics.importance import HeadImportanceMetric, HeadImportanceResult
from attn_callbacks.metrics.mass import ClassMass, ClassMassResult
from attn_callbacks.metrics.outcome_statistics import OutcomeStatistics, OutcomeStatisticsResult
from attn_callbacks.metrics.reliance import RelianceCounts
from attn_callbacks.metrics.roles import HeadRolesMetric, HeadRolesResult
from attn_callbacks.metrics.statistics import HeadStatisticsMetric, HeadStatisticsResult

__all__ = [
    "AlignmentMetric",
    "AlignmentResult",
    "Associations",
    "CalibrationResult",
    "ClassAttention",
    "ClassAttentionResult",
    "ClassMass",
    "ClassMassResult",
    "GroupCalibration",
    "GroupConfusion",
    "HeadDistance",
    "HeadDistanceResult",
    "HeadImportanceMetric",
    "HeadImportanceResult",
    "HeadRolesMetric",
    "HeadRolesResult",
    "HeadStatisticsMetric",
    "HeadStatisticsResult",
    "OutcomeStatistics",
    "OutcomeStatisticsResult",
    "RelianceCounts",
    "TokenAssociation",
    "TokenSums",
    "associations",
    "class_divergence",
]
