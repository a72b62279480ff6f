"""The modules of `losses.attention` in the battery."""

from __future__ import annotations

import torch

from losses import AttentionGuidedLoss
from tests.losses.cases import Arguments, Case


def weights(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).softmax(dim=-1).requires_grad_()


def arguments() -> Arguments:
    mask = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 1, 0, 0]])
    return ([weights(2, 3, 5, 5), weights(2, 3, 5, 5)], mask, torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])), {}


def unmarked() -> Arguments:
    return (weights(2, 3, 5, 5), torch.zeros(2, 5)), {}


CASES = {
    "AttentionGuidedLoss": Case(lambda: AttentionGuidedLoss(form="log"), arguments, unmarked),
}
