"""What a model relies on: penalties on input gradients, rationales and weights."""

from __future__ import annotations

from losses.reliance.elastic_net import ElasticNetPenalty, elastic_net
from losses.reliance.group_lasso import GroupLassoPenalty, group_lasso
from losses.reliance.input_gradient import InputGradientPenalty, input_gradient_penalty
from losses.reliance.mask_randomization import MaskRandomization, randomize_masked
from losses.reliance.rationale_margin import RationaleMarginLoss, rationale_margin_loss

__all__ = [
    "ElasticNetPenalty",
    "GroupLassoPenalty",
    "InputGradientPenalty",
    "MaskRandomization",
    "RationaleMarginLoss",
    "elastic_net",
    "group_lasso",
    "input_gradient_penalty",
    "randomize_masked",
    "rationale_margin_loss",
]
