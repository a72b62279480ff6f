"""The modules of `losses.balancing` in the battery."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from losses.balancing import (
    DynamicWeightAverage,
    GradNorm,
    LossBalancer,
    RandomLossWeighting,
    UncertaintyWeighting,
)
from tests.losses.cases import Arguments, Case


class OnSharedLayer(nn.Module):
    """Three losses of one layer, and how they are weighed: the graph between them is made anew at every call."""

    def __init__(self, weighting: nn.Module) -> None:
        super().__init__()
        self.weighting = weighting

    def forward(self, data: Tensor, shared: Tensor) -> Tensor:
        features = data @ shared
        losses = [features.square().mean(), 3 * features.abs().mean(), features.float().exp().mean()]
        return self.weighting(losses, shared)


def vector() -> Arguments:
    return ((torch.rand(3) + 0.1).requires_grad_(),), {}


def scalars() -> Arguments:
    return ([loss.detach().requires_grad_() for loss in torch.rand(3) + 0.1],), {}


def named() -> Arguments:
    return ({name: (torch.rand(()) + 0.1).requires_grad_() for name in ("label", "rationale", "sparsity")},), {}


def layer() -> Arguments:
    return (torch.randn(5, 4) / 2, (torch.randn(4, 2) / 2).requires_grad_()), {}


CASES = {
    "DynamicWeightAverage": Case(lambda: DynamicWeightAverage(3), scalars),
    "GradNorm": Case(
        lambda: OnSharedLayer(GradNorm(3, initial_loss=[1.0, 2.0, 1.0])),
        layer,
        compiles="it differentiates the losses within its forward; compile the model that makes them",
    ),
    "LossBalancer": Case(
        lambda: LossBalancer(["label", "rationale"], DynamicWeightAverage(2), fixed={"sparsity": 0.1}), named
    ),
    "RandomLossWeighting": Case(lambda: RandomLossWeighting(3, seed=1), vector),
    "UncertaintyWeighting": Case(lambda: UncertaintyWeighting(3, classification=[True, False, False]), vector),
}
