"""Losses for classifiers on imbalanced or biased data: class weights, margins, focus on what is hard."""

from __future__ import annotations

from losses.classification.balanced_softmax import BalancedSoftmaxLoss
from losses.classification.class_balanced import ClassBalancedLoss, class_balanced_loss, effective_number_weights
from losses.classification.focal import FocalLoss, focal_loss
from losses.classification.label_smoothing import LabelSmoothing, smooth_labels
from losses.classification.ldam import LDAMLoss, ldam_loss, ldam_margins
from losses.classification.logit_adjustment import LogitAdjustedLoss, adjust_logits, logit_adjusted_loss
from losses.classification.prior import log_prior
from losses.classification.seesaw import SeesawLoss, seesaw_loss
from losses.classification.sigmoid_focal import SigmoidFocalLoss, sigmoid_focal_loss
from losses.classification.weighted import WeightedCrossEntropyLoss, weighted_cross_entropy

__all__ = [
    "BalancedSoftmaxLoss",
    "ClassBalancedLoss",
    "FocalLoss",
    "LDAMLoss",
    "LabelSmoothing",
    "LogitAdjustedLoss",
    "SeesawLoss",
    "SigmoidFocalLoss",
    "WeightedCrossEntropyLoss",
    "adjust_logits",
    "class_balanced_loss",
    "effective_number_weights",
    "focal_loss",
    "ldam_loss",
    "ldam_margins",
    "log_prior",
    "logit_adjusted_loss",
    "seesaw_loss",
    "sigmoid_focal_loss",
    "smooth_labels",
    "weighted_cross_entropy",
]
