"""The classification losses of the battery."""

from __future__ import annotations

import torch

from losses import WeightedCrossEntropyLoss
from tests.losses.cases import Arguments, Case

CLASSES = 4


def arguments() -> Arguments:
    logits = torch.randn(6, CLASSES).requires_grad_()
    return (logits, torch.randint(CLASSES, (6,))), {"sample_weight": torch.rand(6)}


def ignored() -> Arguments:
    return (torch.randn(6, CLASSES).requires_grad_(), torch.full((6,), -100)), {}


CASES = {
    "WeightedCrossEntropyLoss": Case(
        lambda: WeightedCrossEntropyLoss(CLASSES, [1.0, 2.0, 0.5, 3.0]), arguments, ignored
    ),
}
