"""See where the attention heads of a model look while it trains, and act on the bias that shows.

Importing this package costs nothing: a public name brings torch or Lightning when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attn_callbacks.batch import BatchSchema
    from attn_callbacks.bias import BiasReport
    from attn_callbacks.callbacks import (
        AlignmentMonitor,
        AttentionHeatmaps,
        AttentionPaths,
        BiasMonitor,
        ErrorAnalysis,
        HeadImportance,
        HeadRoles,
        HeadStatistics,
        TrainingHealth,
    )
    from attn_callbacks.capture import AttentionCall, AttentionNotFoundError, AttentionRecorder, record
    from attn_callbacks.feedback import (
        AdversarialTraining,
        AttentionGuidance,
        ClassReweighting,
        DynamicDistributedSampler,
        EnsembleFeedback,
        FeatureRegularization,
        Feedback,
        GroupReweighting,
        InputGradientPenalty,
        LossBalancing,
        MaskRandomization,
        RandomLossWeights,
        RandomRationaleControl,
        Resampling,
        StaticInverseFrequency,
    )

__version__ = "0.1.0"

_HOMES = {
    "AdversarialTraining": "feedback",
    "AlignmentMonitor": "callbacks",
    "AttentionCall": "capture",
    "AttentionGuidance": "feedback",
    "AttentionHeatmaps": "callbacks",
    "AttentionNotFoundError": "capture",
    "AttentionPaths": "callbacks",
    "AttentionRecorder": "capture",
    "BatchSchema": "batch",
    "BiasMonitor": "callbacks",
    "BiasReport": "bias",
    "ClassReweighting": "feedback",
    "DynamicDistributedSampler": "feedback",
    "EnsembleFeedback": "feedback",
    "ErrorAnalysis": "callbacks",
    "FeatureRegularization": "feedback",
    "Feedback": "feedback",
    "GroupReweighting": "feedback",
    "HeadImportance": "callbacks",
    "HeadRoles": "callbacks",
    "HeadStatistics": "callbacks",
    "InputGradientPenalty": "feedback",
    "LossBalancing": "feedback",
    "MaskRandomization": "feedback",
    "RandomLossWeights": "feedback",
    "RandomRationaleControl": "feedback",
    "Resampling": "feedback",
    "StaticInverseFrequency": "feedback",
    "TrainingHealth": "callbacks",
    "record": "capture",
}

__all__ = [
    "AdversarialTraining",
    "AlignmentMonitor",
    "AttentionCall",
    "AttentionGuidance",
    "AttentionHeatmaps",
    "AttentionNotFoundError",
    "AttentionPaths",
    "AttentionRecorder",
    "BatchSchema",
    "BiasMonitor",
    "BiasReport",
    "ClassReweighting",
    "DynamicDistributedSampler",
    "EnsembleFeedback",
    "ErrorAnalysis",
    "FeatureRegularization",
    "Feedback",
    "GroupReweighting",
    "HeadImportance",
    "HeadRoles",
    "HeadStatistics",
    "InputGradientPenalty",
    "LossBalancing",
    "MaskRandomization",
    "RandomLossWeights",
    "RandomRationaleControl",
    "Resampling",
    "StaticInverseFrequency",
    "TrainingHealth",
    "record",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'attn_callbacks' has no attribute {name!r}")
    found = getattr(importlib.import_module(f"attn_callbacks.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
