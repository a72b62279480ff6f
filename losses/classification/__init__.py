"""Losses for classifiers on imbalanced or biased data: class weights, margins, focus on what is hard."""

from __future__ import annotations

from losses.classification.weighted import WeightedCrossEntropyLoss, weighted_cross_entropy

__all__ = ["WeightedCrossEntropyLoss", "weighted_cross_entropy"]
