"""The classification losses of the battery."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losses.classification import (
    BalancedSoftmaxLoss,
    ClassBalancedLoss,
    FocalLoss,
    LabelSmoothing,
    LDAMLoss,
    LogitAdjustedLoss,
    SeesawLoss,
    SigmoidFocalLoss,
    WeightedCrossEntropyLoss,
)
from tests.losses.cases import Arguments, Case

CLASSES = 4
COUNTS = [100, 0, 7, 30]


class SmoothedCrossEntropy(nn.Module):
    """Label smoothing has no gradient of its own: cross entropy of what it returns has one."""

    def __init__(self) -> None:
        super().__init__()
        self.smooth = LabelSmoothing(CLASSES)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits, self.smooth(target))


def arguments() -> Arguments:
    logits = torch.randn(6, CLASSES).requires_grad_()
    return (logits, torch.randint(CLASSES, (6,))), {"sample_weight": torch.rand(6)}


def at_positions() -> Arguments:
    logits = torch.randn(3, CLASSES, 5).clamp(-1, 1).requires_grad_()
    target = torch.randint(CLASSES, (3, 5))
    target[0, 1:3] = -100
    return (logits, target), {"sample_weight": torch.rand(3, 5)}


def smoothed() -> Arguments:
    return (torch.randn(6, CLASSES).requires_grad_(), torch.randint(CLASSES, (6,))), {}


def multi_label() -> Arguments:
    target = torch.randint(2, (6, CLASSES))
    target[0, :2] = -100
    return (torch.randn(6, CLASSES).requires_grad_(), target), {"sample_weight": torch.rand(6)}


def ignored() -> Arguments:
    return (torch.randn(6, CLASSES).requires_grad_(), torch.full((6,), -100)), {}


def missing() -> Arguments:
    return (torch.randn(6, CLASSES).requires_grad_(), torch.full((6, CLASSES), -100)), {}


CASES = {
    "BalancedSoftmaxLoss": Case(lambda: BalancedSoftmaxLoss(COUNTS), arguments, ignored),
    "ClassBalancedLoss": Case(lambda: ClassBalancedLoss(COUNTS, 0.99), at_positions, ignored),
    "FocalLoss": Case(lambda: FocalLoss(class_weight=[1.0, 2.0, 0.5, 3.0]), at_positions, ignored),
    "LDAMLoss": Case(lambda: LDAMLoss(COUNTS), at_positions, ignored),
    "LabelSmoothing": Case(SmoothedCrossEntropy, smoothed),
    "LogitAdjustedLoss": Case(lambda: LogitAdjustedLoss(COUNTS, label_smoothing=0.1), at_positions, ignored),
    "SeesawLoss": Case(lambda: SeesawLoss(CLASSES), at_positions, ignored),
    "SigmoidFocalLoss": Case(lambda: SigmoidFocalLoss(class_weight=[1.0, 2.0, 0.5, 3.0]), multi_label, missing),
    "WeightedCrossEntropyLoss": Case(
        lambda: WeightedCrossEntropyLoss(CLASSES, [1.0, 2.0, 0.5, 3.0]), arguments, ignored
    ),
}
