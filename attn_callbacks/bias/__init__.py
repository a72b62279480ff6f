"""What a bias is: measured rates, their uncertainty, and the findings that are worth acting on. No Lightning."""

from __future__ import annotations

from attn_callbacks.bias.calibration import Calibration
from attn_callbacks.bias.candidate import Candidate
from attn_callbacks.bias.fairness import Disparity
from attn_callbacks.bias.finding import Finding
from attn_callbacks.bias.priors import PriorShift
from attn_callbacks.bias.reliance import Reliance
from attn_callbacks.bias.report import BiasReport
from attn_callbacks.bias.share import AttentionShare

__all__ = [
    "AttentionShare",
    "BiasReport",
    "Calibration",
    "Candidate",
    "Disparity",
    "Finding",
    "PriorShift",
    "Reliance",
]
