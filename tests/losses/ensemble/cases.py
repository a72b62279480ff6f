"""The modules of `losses.ensemble` in the battery."""

from __future__ import annotations

import torch
from torch import nn

from losses import WeightedCrossEntropyLoss
from losses.ensemble import (
    DeepEnsemble,
    EnsembleLoss,
    LearnedMixinLoss,
    NegativeCorrelationLoss,
    ProductOfExpertsLoss,
)
from tests.losses.cases import Arguments, Case

CLASSES = 4
MASKS = [[1, 1, 0, 1, 0], [0, 1, 1, 1, 1], [1, 0, 1, 0, 1]]


def logits(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).requires_grad_()


def labels() -> torch.Tensor:
    return torch.randint(CLASSES, (6,))


def of_members() -> Arguments:
    return (logits(3, 6, CLASSES), labels()), {"sample_weight": torch.rand(6)}


def ignored_members() -> Arguments:
    return (logits(3, 6, CLASSES), torch.full((6,), -100)), {}


def own_losses() -> Arguments:
    return ([logits(6, CLASSES) for _ in range(3)], labels()), {}


def own_ignored_losses() -> Arguments:
    return ([logits(6, CLASSES) for _ in range(3)], torch.full((6,), -100)), {}


def product() -> Arguments:
    return (logits(6, CLASSES), labels(), torch.randn(6, CLASSES)), {"sample_weight": torch.rand(6)}


def ignored_product() -> Arguments:
    return (logits(6, CLASSES), torch.full((6,), -100), torch.randn(6, CLASSES)), {}


def mixin() -> Arguments:
    return (*product()[0], logits(6, 5)), {}


def ignored_mixin() -> Arguments:
    return (*ignored_product()[0], logits(6, 5)), {}


def seeded_mixin() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LearnedMixinLoss(5, class_weight=[1.0, 2.0, 0.5, 3.0])


def seeded_ensemble() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DeepEnsemble.of(lambda: nn.Linear(5, CLASSES), members=3, masks=MASKS)


CASES = {
    "DeepEnsemble": Case(seeded_ensemble, lambda: ((logits(6, 5),), {})),
    "EnsembleLoss": Case(
        lambda: EnsembleLoss([WeightedCrossEntropyLoss(CLASSES) for _ in range(3)], masks=MASKS),
        own_losses,
        own_ignored_losses,
    ),
    "LearnedMixinLoss": Case(seeded_mixin, mixin, ignored_mixin),
    "NegativeCorrelationLoss": Case(
        lambda: NegativeCorrelationLoss(class_weight=[1.0, 2.0, 0.5, 3.0]), of_members, ignored_members
    ),
    "ProductOfExpertsLoss": Case(ProductOfExpertsLoss, product, ignored_product),
}
