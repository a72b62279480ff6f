"""Models whose heads have known effects: a loss that is a function of what each head puts out."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOKENS = 3


class Game(nn.Module):
    """Layers of uniform attention in a row; a head of a layer puts out its own number of the sample.

    Takes ``(samples, layers, heads)`` and returns what heads put out in the same shape.
    """

    def __init__(self, layers: int = 1) -> None:
        super().__init__()
        self.players = nn.ModuleList(_Player() for _ in range(layers))

    def forward(self, numbers: Tensor) -> Tensor:
        return torch.stack([player(numbers[:, layer]) for layer, player in enumerate(self.players)], dim=1)


class _Player(nn.Module):
    def forward(self, numbers: Tensor) -> Tensor:
        value = numbers[:, :, None, None].expand(-1, -1, TOKENS, 1)
        return F.scaled_dot_product_attention(torch.zeros_like(value), torch.zeros_like(value), value).mean(dim=(2, 3))


def game_loss(function: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Tensor], Tensor]:
    """A loss that is a function of ``(samples, layers, heads)``."""
    return lambda model, batch: function(model(batch))


def ones(samples: int = 4, layers: int = 1, heads: int = 2) -> Tensor:
    return torch.ones(samples, layers, heads)


def covering(outputs: Tensor) -> Tensor:
    """None off 1.0, the first off 1.2, the second off 1.1, both off 2.0: they cover for one another."""
    first, second = outputs[:, 0, 0], outputs[:, 0, 1]
    return 2.0 - 0.9 * first - 0.8 * second + 0.7 * first * second


def chained(outputs: Tensor) -> Tensor:
    """Loss 2.0, unless both are there: then 1.0."""
    return 2.0 - outputs[:, 0, 0] * outputs[:, 0, 1]
