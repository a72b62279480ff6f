"""What it costs to ask 144 heads what they do: importance, exact ablation and all pairs, beside a forward for each.

Run: ``python -m benchmarks.heads [--out FOLDER] [--quick]``.

The naive ways take a forward a head and a forward a pair; a sample of heads and pairs is run and scaled to all. On a
CPU ratios are of processor time: what takes many seconds would else measure what else the machine does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attn_callbacks.analysis.ablation import ablate_heads
from attn_callbacks.analysis.head_importance import head_importance
from attn_callbacks.analysis.interaction import head_interactions
from benchmarks.importance import Model
from benchmarks.paired import Interval, Turns, median_interval
from benchmarks.runner import main
from benchmarks.table import Block, Goal, Setting, Table

SAMPLED = 12
NAIVE, NAIVE_PAIRS = f"a forward without each of {SAMPLED} heads", f"a forward without each of {SAMPLED} pairs"
IMPORTANCE, ABLATION, PAIRS = "head_importance", "ablate_heads", "head_interactions, all pairs"
TIMES, SHARE, PAIR_TIMES = "naive ablation / importance", "exact ablation / naive", "naive pairs / all pairs"


def run(setting: Setting) -> Iterator[Block]:
    """Time the functions beside the naive ways."""
    model = Model(setting).eval()
    layers = len(model.projections())
    heads = layers * model.heads
    ids = torch.randint(1000, setting.pick((8, 64), (2, 8)), device=setting.device)
    shape = f"{layers} layers of {model.heads} heads, width {model.width}, {ids.shape[0]} x {ids.shape[1]} tokens"
    arms: dict[str, Callable[[], object]] = {
        NAIVE: lambda: without(model, ids, 1),
        IMPORTANCE: lambda: head_importance(model, [ids], loss),
        ABLATION: lambda: ablate_heads(model, [ids], loss),
    }
    turns = setting.turns(arms, warm_up=1, pairs=5)
    values = {
        TIMES: _scaled(setting, turns, NAIVE, IMPORTANCE, (heads + 1) / SAMPLED),
        SHARE: _scaled(setting, turns, ABLATION, NAIVE, SAMPLED / (heads + 1)),
    }
    yield Block("heads", shape, turns, values)
    few = ids[:1, :32]
    arms = {NAIVE_PAIRS: lambda: without(model, few, 2), PAIRS: lambda: head_interactions(model, [few], loss)}
    turns = setting.turns(arms, warm_up=1, pairs=5)
    pairs = 1 + heads + heads * (heads - 1) // 2
    values = {PAIR_TIMES: _scaled(setting, turns, NAIVE_PAIRS, PAIRS, pairs / SAMPLED)}
    yield Block("pairs", shape.replace(f"{ids.shape[0]} x {ids.shape[1]}", f"1 x {few.shape[1]}"), turns, values)


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the loss of each sample."""
    own: Any = model
    logits = own.head(own.encoder(ids).last_hidden_state.mean(dim=1))
    return nn.functional.cross_entropy(logits, ids[:, 0] % 2, reduction="none")


@torch.no_grad()
def without(model: Model, ids: Tensor, together: int) -> list[Tensor]:
    """Run the model without some heads, ``together`` at a time, by cutting them out before their projections."""
    places = np.random.default_rng(0).integers(len(model.projections()) * model.heads, size=(SAMPLED, together))
    return [_cut(model, ids, [divmod(int(place), model.heads) for place in off]) for off in places]


def _cut(model: Model, ids: Tensor, off: Sequence[tuple[int, int]]) -> Tensor:
    size, projections = model.width // model.heads, model.projections()
    with ExitStack() as stack:
        for layer, head in off:
            hook = projections[layer].register_forward_pre_hook(_without(slice(head * size, (head + 1) * size)))
            stack.callback(hook.remove)
        return loss(model, ids)


def _without(channels: slice) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]:
    def zeroed(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        tokens = inputs[0].clone()
        tokens[..., channels] = 0.0
        return (tokens,)

    return zeroed


def _scaled(setting: Setting, turns: Turns, arm: str, over: str, factor: float) -> Interval:
    times = turns.process if setting.device == "cpu" else turns.wall
    return median_interval(factor * times[arm] / times[over])


TABLE = Table(
    "heads",
    "What 144 heads do",
    (
        Goal(
            "G16",
            "exact leave-one-out of 144 heads, the layers before each head kept / naive",
            bound=0.65,
            predicted=0.54,
            limit="(145 + 12)/2 of 145 forwards: the mean head lies in the middle",
            between="what lies before the softmax of the same layer; whether the kept outputs give the same loss",
            block="heads",
            of=SHARE,
        ),
        Goal(
            "G17",
            "naive ablation of 10,296 pairs of 144 heads / all pairs from gate gradients",
            bound=15,
            predicted=24,
            limit="10,441/156 = 67: a backward to the activations costs a forward; the mean head lies in the middle",
            between="what listening to short calls costs",
            block="pairs",
            of=PAIR_TIMES,
            at_least=True,
        ),
        Goal(
            "G21",
            "naive ablation of 144 heads / `head_importance`, confidence included",
            bound=35,
            predicted=None,
            limit="145/2 = 72, as for G15",
            between="largest weights of all rows, for confidence; what listening to short calls costs",
            block="heads",
            of=TIMES,
            at_least=True,
        ),
    ),
    run,
)

if __name__ == "__main__":
    sys.exit(main([TABLE.name, *sys.argv[1:]]))
