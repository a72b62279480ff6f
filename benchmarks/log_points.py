"""Log points: the numbers of 144 heads in one event, beside a call of `add_scalar` for each; and what adding up costs.

Run: ``python -m benchmarks.log_points [--out FOLDER] [--quick]``.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from attn_callbacks.functional import STATISTICS
from benchmarks.paired import median_interval
from benchmarks.runner import main
from benchmarks.table import Block, Goal, Setting, Table

LAYERS, HEADS, VALUES, BATCH = 12, 12, 6, 8
OURS, LOOP = "one event", "add_scalar, value by value"
ADDED, MICROSECONDS = "adding up a batch of all layers", "microseconds a captured batch"

Runs = dict[str, Callable[[], object]]


def run(setting: Setting) -> Iterator[Block]:
    """Write the same numbers twice; then add up statistics of batches."""
    layers = setting.pick(LAYERS, 2)
    tags = [
        f"heads/{name}/layer_{layer}/head_{head}"
        for name in STATISTICS[:VALUES]
        for layer in range(layers)
        for head in range(HEADS)
    ]
    with tempfile.TemporaryDirectory() as folder:
        arms = _written(dict.fromkeys(tags, 0.5), folder)
        yield Block("event", f"{len(tags)} numbers to TensorBoard, flushed", setting.turns(arms, warm_up=2))
    turns = setting.turns({ADDED: _added(layers, setting.device)}, warm_up=3)
    values = {MICROSECONDS: median_interval(1e6 * turns.wall[ADDED])}
    yield Block("sums", f"statistics of {layers} layers, {HEADS} heads, {BATCH} samples", turns, values)


def _written(numbers: dict[str, float], folder: str) -> Runs:
    from pytorch_lightning.loggers import TensorBoardLogger  # takes seconds to import

    from attn_callbacks.callbacks._guard import Guard
    from attn_callbacks.callbacks._loggers import log_point
    from attn_callbacks.callbacks._writer import BackgroundWriter

    ours, loop = (TensorBoardLogger(folder, name=name) for name in ("event", "loop"))
    trainer: Any = SimpleNamespace(loggers=[ours], global_step=0)
    writer = BackgroundWriter(Guard("`log_points`"))

    def one_event() -> None:
        trainer.global_step += 1
        log_point(trainer, writer, Path(folder), {}, numbers)
        writer.close()  # waits for the thread
        ours.experiment.flush()

    def value_by_value() -> None:
        for tag, number in numbers.items():
            loop.experiment.add_scalar(tag, number, trainer.global_step)
        loop.experiment.flush()

    return {OURS: one_event, LOOP: value_by_value}


def _added(layers: int, device: str) -> Callable[[], object]:
    from attn_callbacks.callbacks._head_sums import HeadSums

    sums, weight = HeadSums(), torch.full((BATCH,), 64, device=device)
    statistics = torch.rand(BATCH, HEADS, len(STATISTICS), device=device)

    def add() -> None:
        for layer in range(layers):
            sums.add(f"layer_{layer}", statistics, weight)

    return add


TABLE = Table(
    "log_points",
    "What it costs to write and to add up numbers of 144 heads",
    (
        Goal(
            "G12",
            "`add_scalar` loop / one event, 864 numbers",
            bound=5,
            predicted=9,
            limit="one append to a file; encoding 864 tags takes 2 to 3 ms",
            between="tags as strings, and a thread that begins and ends",
            block="event",
            of=(LOOP, OURS),
            at_least=True,
        ),
        Goal(
            "G13",
            "adding up the statistics of 12 layers of 12 heads, a captured batch",
            bound=50,
            predicted=600,
            limit="3.5 kB to add: 12 µs with one operation for all layers",
            between="layers come one after the other, and medians need a histogram",
            block="sums",
            of=MICROSECONDS,
            unit="µs",
        ),
    ),
    run,
)

if __name__ == "__main__":
    sys.exit(main([TABLE.name, *sys.argv[1:]]))
