"""What is fed back to training after a bias was found. Each knows the module and the report, none the Trainer."""

from __future__ import annotations

from attn_callbacks.feedback.attention_guidance import AttentionGuidance
from attn_callbacks.feedback.base import Feedback
from attn_callbacks.feedback.class_reweighting import ClassReweighting

__all__ = ["AttentionGuidance", "ClassReweighting", "Feedback"]
