"""Pictures: the attention maps of 144 heads as one grid, beside a grid of matplotlib axes.

Run: ``python -m benchmarks.pictures [--out FOLDER] [--quick]``.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from attn_callbacks.render import attention_heads
from benchmarks.paired import median_interval
from benchmarks.runner import main
from benchmarks.table import Block, Goal, Setting, Table

OURS, AXES, BARE = "attention_heads, to PNG", "matplotlib axes, to PNG", "matplotlib without ticks, to PNG"
TIME = "ms of one grid"

Array = np.ndarray[Any, Any]


def run(setting: Setting) -> Iterator[Block]:
    """Draw the same maps twice."""
    side, length = setting.pick((12, 64), (2, 8))
    logits = np.random.default_rng(0).normal(size=(side * side, length, length)).astype(np.float32)
    maps = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    arms = {
        OURS: lambda: attention_heads(maps).png(),
        AXES: _matplotlib_grid(maps, side, ticks=True),
        BARE: _matplotlib_grid(maps, side, ticks=False),
    }
    turns = setting.turns(arms, warm_up=1)
    columns = {"kB": {name: len(arm()) / 1e3 for name, arm in arms.items()}}
    values = {TIME: median_interval(1000 * turns.wall[OURS])}
    yield Block("grid", f"{side * side} maps of {length} x {length}", turns, values, columns)


def _matplotlib_grid(maps: Array, side: int, ticks: bool) -> Callable[[], bytes]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("The pictures to beat need `pip install attn-callbacks[benchmarks]`.") from None

    def draw() -> bytes:
        figure = Figure(figsize=(side, side))
        FigureCanvasAgg(figure)
        for axes, weights in zip(figure.subplots(side, side).ravel(), maps, strict=True):
            axes.imshow(weights)
            axes.axison = ticks
        file = io.BytesIO()
        figure.savefig(file, format="png")
        return file.getvalue()

    return draw


def _faster(quantity: str, arm: str, predicted: float | None) -> Goal:
    return Goal(
        "G11",
        quantity,
        bound=50,
        predicted=predicted,
        limit="about 300: compressing the pixels at zlib's lowest level takes 10 to 15 ms",
        between="colour indices, frames and titles of 144 panels in numpy",
        block="grid",
        of=(arm, OURS),
        at_least=True,
    )


TABLE = Table(
    "pictures",
    "A grid of 144 attention maps, drawn and encoded",
    (
        _faster("matplotlib grid / our grid, 144 maps of 64 x 64", AXES, predicted=80),
        _faster("the same without the ticks of its axes", BARE, predicted=None),
        Goal(
            "G11",
            "time of our grid",
            bound=80,
            predicted=50,
            limit="10 to 15 ms, as above",
            between="as above",
            block="grid",
            of=TIME,
            unit="ms",
        ),
    ),
    run,
)

if __name__ == "__main__":
    sys.exit(main([TABLE.name, *sys.argv[1:]]))
