"""What looking leaves behind in a compiled model: graphs compiled anew, on captured steps and afterwards.

Counted and not timed. The compiler's front end does all its work; the graphs then run eagerly.

Run: ``python -m benchmarks.recompiles [--out FOLDER] [--quick]``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from attn_callbacks.capture import AttentionRecorder
from benchmarks.paired import Interval
from benchmarks.runner import main
from benchmarks.table import Block, Goal, Setting, Table

STEPS = 10
GRAPHS, ANEW, BREAKS = "graphs of the model", "graphs compiled anew by captures", "graph breaks"


def run(setting: Setting) -> Iterator[Block]:
    """Train a compiled model, look at every other step, and count graphs."""
    torch.compiler.reset()
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(32, nhead=4, dim_feedforward=64, batch_first=True), num_layers=2
    ).to(setting.device)
    counter = CompileCounter()
    compiled: Any = torch.compile(model, backend=counter)
    tokens = torch.randn(2, 16, 32, device=setting.device)
    compiled(tokens).sum().backward()
    before, looked = counter.frame_count, 0
    for step in range(STEPS):
        if step % 2:
            compiled(tokens).sum().backward()
            continue
        with AttentionRecorder(compiled, on_call=lambda call: None) as recorder:
            compiled(tokens).sum().backward()
        looked += len(recorder.names)
    if not looked:
        raise RuntimeError("No attention was seen on the captured steps.")
    counts = {GRAPHS: before, ANEW: counter.frame_count - before, BREAKS: before - 1}
    values = {name: Interval.exact(count) for name, count in counts.items()}
    yield Block("compiled", f"{STEPS} training steps of a compiled model, half of them captured", values=values)


def _none(quantity: str, of: str) -> Goal:
    limit = "0: nothing is installed between captures, and captured steps run eagerly"
    return Goal("G19", quantity, bound=0, predicted=0, limit=limit, between="nothing", block="compiled", of=of)


TABLE = Table(
    "recompiles",
    "Graphs compiled anew because somebody looked",
    (_none("recompiles of a model that is looked at now and then", ANEW), _none("graph breaks", BREAKS)),
    run,
)

if __name__ == "__main__":
    sys.exit(main([TABLE.name, *sys.argv[1:]]))
