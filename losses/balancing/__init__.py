"""Many losses at once: which weight each one gets, or how their gradients are combined."""

from __future__ import annotations

from losses.balancing.balancer import LossBalancer
from losses.balancing.dynamic_average import DynamicWeightAverage, dynamic_average_weights
from losses.balancing.gradnorm import GradNorm, gradnorm_weights
from losses.balancing.random_weighting import RandomLossWeighting, random_loss_weights
from losses.balancing.surgery import GradientSurgery
from losses.balancing.uncertainty import UncertaintyWeighting, uncertainty_weighted_loss

__all__ = [
    "DynamicWeightAverage",
    "GradNorm",
    "GradientSurgery",
    "LossBalancer",
    "RandomLossWeighting",
    "UncertaintyWeighting",
    "dynamic_average_weights",
    "gradnorm_weights",
    "random_loss_weights",
    "uncertainty_weighted_loss",
]
