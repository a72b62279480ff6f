"""What is fed back to training after a bias was found. Each knows the module and the report, none the Trainer."""

from __future__ import annotations

from attn_callbacks.feedback.action import Action
from attn_callbacks.feedback.adversarial_training import AdversarialTraining
from attn_callbacks.feedback.attention_guidance import AttentionGuidance
from attn_callbacks.feedback.automatic import automatic_feedback
from attn_callbacks.feedback.base import Feedback
from attn_callbacks.feedback.class_reweighting import ClassReweighting
from attn_callbacks.feedback.double_correction import double_correction, effective_prior
from attn_callbacks.feedback.ensemble_feedback import EnsembleFeedback
from attn_callbacks.feedback.feature_regularization import FeatureRegularization
from attn_callbacks.feedback.group_reweighting import GroupReweighting
from attn_callbacks.feedback.input_gradient import InputGradientPenalty
from attn_callbacks.feedback.loss_balancing import LossBalancing
from attn_callbacks.feedback.mask_randomization import MaskRandomization
from attn_callbacks.feedback.random_loss_weights import RandomLossWeights
from attn_callbacks.feedback.random_rationale import RandomRationaleControl
from attn_callbacks.feedback.resampling import Resampling
from attn_callbacks.feedback.sampler import DynamicDistributedSampler
from attn_callbacks.feedback.static_inverse_frequency import StaticInverseFrequency
from attn_callbacks.feedback.step import StepFeedback, TrainingStep

__all__ = [
    "Action",
    "AdversarialTraining",
    "AttentionGuidance",
    "ClassReweighting",
    "DynamicDistributedSampler",
    "EnsembleFeedback",
    "FeatureRegularization",
    "Feedback",
    "GroupReweighting",
    "InputGradientPenalty",
    "LossBalancing",
    "MaskRandomization",
    "RandomLossWeights",
    "RandomRationaleControl",
    "Resampling",
    "StaticInverseFrequency",
    "StepFeedback",
    "TrainingStep",
    "automatic_feedback",
    "double_correction",
    "effective_prior",
]
