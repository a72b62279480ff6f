"""The modules of `losses.adversarial` in the battery; their closures are modules, so that they can move to a device."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losses.adversarial import FGM, PGD, FreeLB, SMARTLoss, VirtualAdversarialLoss
from tests.losses.cases import Arguments, Case

CLASSES = 3
NO_COMPILE = "takes gradients inside its forward, with torch.autograd.grad"


class Logits(nn.Module):
    """A seeded classifier of embeddings, ``(samples, tokens, 4)`` to ``(samples, classes)``."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.register_buffer("inner", torch.randn(4, 6, generator=generator))
        self.register_buffer("outer", torch.randn(6, CLASSES, generator=generator))

    def forward(self, embeddings: Tensor) -> Tensor:
        hidden = torch.tanh(embeddings.to(self.inner.dtype).mean(dim=1) @ self.inner)
        return hidden @ self.outer


class Criterion(nn.Module):
    """Cross entropy of the classifier's predictions."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self.logits = Logits()
        self.register_buffer("target", target)

    def forward(self, embeddings: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(embeddings), self.target)


def embeddings() -> Tensor:
    return torch.randn(5, 7, 4).requires_grad_()


def tokens() -> Tensor:
    mask = torch.rand(5, 7) < 0.7
    mask[1] = False
    return mask


def with_loss() -> Arguments:
    return (Criterion(torch.randint(CLASSES, (5,))), embeddings()), {"mask": tokens()}


def with_logits() -> Arguments:
    return (Logits(), embeddings()), {"mask": tokens(), "valid": torch.tensor([True, True, False, True, True])}


def nothing_allowed() -> Arguments:
    return (Logits(), embeddings()), {"mask": torch.zeros(5, 7, dtype=torch.bool)}


CASES: dict[str, Case] = {
    "FGM": Case(FGM, with_loss, compiles=NO_COMPILE),
    "PGD": Case(lambda: PGD(bounds=(-6, 6)), with_loss, compiles=NO_COMPILE),
    "FreeLB": Case(lambda: FreeLB(start_size=0), with_loss, compiles=NO_COMPILE),
    "SMARTLoss": Case(lambda: SMARTLoss(epsilon=0.5, step_size=0.5), with_logits, nothing_allowed, compiles=NO_COMPILE),
    "VirtualAdversarialLoss": Case(VirtualAdversarialLoss, with_logits, nothing_allowed, compiles=NO_COMPILE),
}
