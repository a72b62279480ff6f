"""Losses and modules for several models that learn together."""

from __future__ import annotations

from losses.ensemble.ambiguity import AmbiguityDecomposition, ambiguity_decomposition
from losses.ensemble.correlation import NegativeCorrelationLoss, negative_correlation_loss
from losses.ensemble.deep import DeepEnsemble
from losses.ensemble.experts import ProductOfExpertsLoss, product_of_experts_loss
from losses.ensemble.members import EnsembleLoss, EnsembleOutput
from losses.ensemble.mixin import LearnedMixinLoss, learned_mixin_loss

__all__ = [
    "AmbiguityDecomposition",
    "DeepEnsemble",
    "EnsembleLoss",
    "EnsembleOutput",
    "LearnedMixinLoss",
    "NegativeCorrelationLoss",
    "ProductOfExpertsLoss",
    "ambiguity_decomposition",
    "learned_mixin_loss",
    "negative_correlation_loss",
    "product_of_experts_loss",
]
