"""What guidance of attention sees of a training step."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from attn_callbacks.capture import AttentionCall


def call(name="layer", queries=4, keys=4, batch=2, grad=True, **arguments):
    generator = torch.Generator().manual_seed(len(name))
    query = torch.randn(batch, 2, queries, 8, generator=generator, requires_grad=grad)
    return AttentionCall(name, query=query, key=torch.randn(batch, 2, keys, 8, generator=generator), **arguments)


@dataclass
class Step:
    """The calls of attention, the tokens that are marked, and the loss."""

    calls: list[AttentionCall] = field(default_factory=lambda: [call()])
    relevance: Tensor | None = None
    spurious: Tensor | None = None
    valid: Tensor | None = None
    loss: Tensor = field(default_factory=lambda: torch.tensor(2.0))
