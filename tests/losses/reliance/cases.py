"""The modules of `losses.reliance` in the battery."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losses.reliance.elastic_net import ElasticNetPenalty
from losses.reliance.group_lasso import GroupLassoPenalty
from losses.reliance.input_gradient import InputGradientPenalty
from losses.reliance.mask_randomization import MaskRandomization
from losses.reliance.rationale_margin import RationaleMarginLoss
from tests.losses.cases import Arguments, Case


class Applied(nn.Module):
    """The penalty with the model it belongs to: its logits have to come from its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).sin().reshape(parameter.shape))
        self.penalty = InputGradientPenalty(0.5, calibration_steps=2)
        self.penalty.steps.fill_(2)  # calibrated, so that there is something to compare
        self.penalty.measured.copy_(torch.tensor([3.0, 2.0]))

    def forward(self, inputs: Tensor, target_mask: Tensor) -> Tensor:
        logits = self.model(inputs)
        base = F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))
        return self.penalty(logits, inputs, target_mask, base_loss=base)


def forbidden() -> Arguments:
    return (torch.randn(3, 4).requires_grad_(), torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]])), {}


def nothing_forbidden() -> Arguments:
    return (torch.randn(3, 4).requires_grad_(), torch.zeros(3, 4)), {}


def margins() -> Arguments:
    pair = (torch.randn(5, 3).requires_grad_(), torch.randn(5, 3).requires_grad_())
    return (*pair, torch.randint(3, (5,))), {"present": torch.tensor([1, 1, 0, 1, 1]), "sample_weight": torch.rand(5)}


def no_rationale() -> Arguments:
    pair = (torch.randn(5, 3).requires_grad_(), torch.randn(5, 3).requires_grad_())
    return (*pair, torch.randint(3, (5,))), {"present": torch.zeros(5)}


def pictures() -> Arguments:
    # a batch of two has one way to shuffle, so that every device draws the same
    return (torch.randn(2, 3, 4, 4).requires_grad_(), torch.randint(2, (2, 4, 4))), {}


def weights() -> Arguments:
    return ([torch.randn(4, 5).requires_grad_(), torch.randn(2, 5).requires_grad_()],), {}


def zeros() -> Arguments:
    return (torch.zeros(4, 5).requires_grad_(),), {}


STRENGTH = [1.0, 0.0, 2.0, 0.5, 1.0]
CASES = {
    "InputGradientPenalty": Case(Applied, forbidden, nothing_forbidden, compiles="double backward"),
    "RationaleMarginLoss": Case(lambda: RationaleMarginLoss(0.7), margins, no_rationale),
    "MaskRandomization": Case(MaskRandomization, pictures),
    "GroupLassoPenalty": Case(
        lambda: GroupLassoPenalty(0.1, feature_strength=STRENGTH, groups=[0, 0, 1, 2, 2]), weights, zeros
    ),
    "ElasticNetPenalty": Case(lambda: ElasticNetPenalty(0.1, 0.2, feature_strength=STRENGTH), weights, zeros),
}
