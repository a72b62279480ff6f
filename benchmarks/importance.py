"""Importance of heads: gate gradients met in the backward, beside a training step without, and naive ablation.

Run: ``python -m benchmarks.importance [--out FOLDER] [--quick]``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from attn_callbacks.capture import AttentionRecorder
from attn_callbacks.functional.importance import gate_gradient
from benchmarks.paired import Interval
from benchmarks.runner import main
from benchmarks.table import Block, Goal, Setting, Table

WIDTH, LAYERS, HEADS = 384, 12, 12
BARE, GATED = "training step", "training step, gate gradients gathered"
PASS, ABLATION, AGREE = "one pass with gate gradients", "a forward without each head", "correlation with ablation"


class Model(nn.Module):
    """An encoder of the shape of MiniLM-L12 and a loss."""

    automatic_optimization = True

    def __init__(self, setting: Setting) -> None:
        from benchmarks.models import bert  # transformers takes seconds to import

        super().__init__()
        self.heads, self.width = setting.pick((HEADS, WIDTH), (2, 16))
        layers = setting.pick(LAYERS, 2)
        self.encoder: Any = bert(64, "sdpa", self.width, layers, self.heads)
        self.head = nn.Linear(self.width, 2)
        for module in self.modules():  # the same loss in all forwards, or they could not be compared
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        self.to(setting.device).train()

    def forward(self, ids: Tensor) -> Tensor:
        """Return the loss."""
        logits = self.head(self.encoder(ids).last_hidden_state.mean(dim=1))
        return nn.functional.cross_entropy(logits, ids[:, 0] % 2)

    def projections(self) -> list[nn.Module]:
        """Return what the joined heads of each layer go into."""
        return [layer.attention.output.dense for layer in self.encoder.encoder.layer]


def run(setting: Setting) -> Iterator[Block]:
    """Time training steps, then the two ways to find out which head matters."""
    model = Model(setting)
    ids = torch.randint(1000, setting.pick((8, 64), (2, 8)), device=setting.device)
    shape = f"{len(model.projections())} layers of {model.heads} heads, width {model.width}"
    yield Block(
        "step", f"{shape}, {ids.shape[0]} x {ids.shape[1]} tokens", setting.turns(_steps(model, ids), warm_up=1)
    )
    few = torch.randint(1000, setting.pick((1, 32), (2, 8)), device=setting.device)
    turns = setting.turns({PASS: lambda: one_pass(model, few), ABLATION: lambda: ablation(model, few)}, warm_up=1)
    both = torch.stack([-one_pass(model, few).flatten(), ablation(model, few).flatten()])
    values = {AGREE: Interval.exact(torch.corrcoef(both)[0, 1].item())}
    yield Block("ablation", f"{shape}, {few.shape[0]} x {few.shape[1]} tokens", turns, values)


def one_pass(model: Model, ids: Tensor) -> Tensor:
    """Forward and backward to the outputs of attention: gate gradients ``(layers, heads)`` of the loss."""
    with AttentionRecorder(model) as recorder:
        loss = model(ids)
    outputs = [call.output for call in recorder.calls if call.output is not None]
    gradients = torch.autograd.grad(loss, outputs)
    return torch.stack([gate_gradient(*pair).sum(dim=0) for pair in zip(outputs, gradients, strict=True)])


@torch.no_grad()
def ablation(model: Model, ids: Tensor) -> Tensor:
    """Run the model once as it is and once without each head: how much the loss rises, ``(layers, heads)``."""
    whole, rises, size = model(ids), [], model.width // model.heads
    for projection in model.projections():
        for head in range(model.heads):
            hook = projection.register_forward_pre_hook(_without(slice(head * size, (head + 1) * size)))
            rises.append(model(ids) - whole)
            hook.remove()
    return torch.stack(rises).view(-1, model.heads)


def _without(channels: slice) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]:
    def zeroed(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        tokens = inputs[0].clone()
        tokens[..., channels] = 0.0
        return (tokens,)

    return zeroed


def _steps(model: Model, ids: Tensor) -> dict[str, Callable[[], object]]:
    from attn_callbacks.batch import BatchSchema
    from attn_callbacks.callbacks._gates import GateGradients
    from attn_callbacks.callbacks._guard import Guard

    strategy = SimpleNamespace(root_device=ids.device)
    trainer: Any = SimpleNamespace(accumulate_grad_batches=1, precision_plugin=None, strategy=strategy, world_size=1)
    wrapped: Any = model
    gates = GateGradients(trainer, wrapped, None, 1, BatchSchema(), Guard("`importance`"))
    watch: Any = gates.tap.context
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

    def step() -> None:
        model(ids).backward()
        optimizer.step()
        optimizer.zero_grad()

    def gated() -> None:
        with watch({"input_ids": ids}):
            loss = model(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    gated()
    result = gates.result()
    if result is None or not result.samples.all():
        raise RuntimeError("No gate gradient arrived.")
    return {BARE: step, GATED: gated}


TABLE = Table(
    "importance",
    "Which heads matter, of 144",
    (
        Goal(
            "G14",
            "training step with the gate gradients of all heads / bare",
            bound=1.03,
            on_cuda=1.02,
            predicted=1.02,
            limit="reading the outputs of attention and their gradients once: below 1.01",
            between="hooks on a backward of small layers; every step is listened to here",
            block="step",
            of=(GATED, BARE),
        ),
        Goal(
            "G15",
            "naive ablation of 144 heads / one pass with gate gradients",
            bound=35,
            predicted=50,
            limit="145/2 = 72: a backward that stops at the activations costs one forward, with all weights two",
            between="what a recorder does around short calls",
            block="ablation",
            of=(ABLATION, PASS),
            at_least=True,
        ),
    ),
    run,
)

if __name__ == "__main__":
    sys.exit(main([TABLE.name, *sys.argv[1:]]))
