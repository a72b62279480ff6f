"""Two layers of attention, gates that are really there, and the least callback that gathers their gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from attn_callbacks import BatchSchema
from attn_callbacks.callbacks._gates import GateGradients
from attn_callbacks.callbacks._guard import Guard
from attn_callbacks.callbacks._steps import tap_step
from attn_callbacks.metrics.importance import HeadImportanceResult
from tests.callbacks.models import HEADS, LAYERS, fit, pl, quiet_trainer
from tests.capture.reference import EagerAttention, SelfAttention

SAMPLES, LENGTH, WIDTH = 12, 5, 8
VALUES = torch.randn(SAMPLES, LENGTH, WIDTH, generator=torch.Generator().manual_seed(5))
TARGETS = torch.arange(SAMPLES) % 3
FORMS = {"sdpa": SelfAttention, "eager": EagerAttention}


class Importance(pl.Callback):
    """The least that uses `GateGradients`."""

    def __init__(self, every_n_steps: int = 1, layers: Sequence[str] | None = None, **schema: Any) -> None:
        self.options = layers, every_n_steps, BatchSchema(**schema)
        self.guard = Guard("Importance")
        self.found: list[HeadImportanceResult | None] = []

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.gates = GateGradients(trainer, pl_module, *self.options, self.guard)
        self.remove = tap_step(pl_module, "training_step", self.gates.tap)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.found.append(self.gates.result())

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.remove()

    @property
    def means(self) -> np.ndarray:
        (result,) = self.found
        assert result is not None
        return result.mean.numpy()


class Net(nn.Module):
    """Two layers of attention and a classifier; ``gates (layers, heads)`` are only there when they are asked for."""

    def __init__(self, form: str = "sdpa", dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(FORMS[form](WIDTH, HEADS, dropout=dropout) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, tokens: Tensor, gates: Tensor | None = None) -> Tensor:
        for number, layer in enumerate(self.layers):
            tokens = tokens + (layer(tokens) if gates is None else self.gated(layer, tokens, gates[number]))
        return self.head(tokens.mean(dim=1))

    def gated(self, layer: SelfAttention, tokens: Tensor, gates: Tensor) -> Tensor:
        weight = layer.out.weight * gates.repeat_interleave(WIDTH // HEADS)
        return torch.func.functional_call(layer, {"out.weight": weight}, (tokens,))


class Still(pl.LightningModule):
    """Trains with a learning rate of zero, so that every step sees the same weights."""

    def __init__(self, net: nn.Module | None = None, lr: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net, self.lr = Net() if net is None else net, lr

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.lr)


def data(batch_size: int = 4) -> DataLoader[Any]:
    return DataLoader(list(zip(VALUES, TARGETS, strict=True)), batch_size)


def train(folder: Path, module: Any, callback: Importance, batch_size: int = 4, **options: Any) -> Importance:
    fit(module, quiet_trainer(folder, [callback], **options), data(batch_size), data())
    return callback


def explicit(net: Net, loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy) -> np.ndarray:
    """Gradients of gates ``(samples, layers, heads)``, one sample after the other."""
    found = []
    for tokens, target in zip(VALUES, TARGETS, strict=True):
        gates = torch.ones(LAYERS, HEADS, requires_grad=True)
        value = loss(net(tokens[None], gates), target[None])
        found += torch.autograd.grad(value, gates)
    return torch.stack(found).numpy()


def assert_means(callback: Importance, expected: np.ndarray, tolerance: float = 1e-6) -> None:
    np.testing.assert_allclose(callback.means, np.abs(expected).mean(axis=0), rtol=10 * tolerance, atol=tolerance)
    assert np.abs(expected).max() > 1e-3
