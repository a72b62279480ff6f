"""What is told of an alignment: a few numbers for monitors, a picture a quantity, everything as a table."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path

from attn_callbacks.callbacks._writer import BackgroundWriter
from attn_callbacks.functional.alignment_shape import ALIGNMENT_QUANTITIES
from attn_callbacks.metrics.alignment import AlignmentResult
from attn_callbacks.render import Picture, layer_head_grid

__all__ = ["GOLD_TAGS", "SHAPE_TAGS", "alignment_scalars", "append_alignment", "quantity_pictures"]

_GOLD = ("error_rate", "precision", "recall")
_SHAPE = ("monotonicity", "coverage", "coverage_deviation", "confidence")

GOLD_TAGS: tuple[str, ...] = (*(f"alignment/{name}" for name in _GOLD), "alignment/error_rate_layer")
"""Tags of the numbers that need gold links."""

SHAPE_TAGS: tuple[str, ...] = tuple(f"alignment/{name}_mean" for name in _SHAPE)
"""Tags of the others."""

_COLUMNS = ("epoch", "step", "layer", "head", "quantity", "value", "standard_error")


def alignment_scalars(result: AlignmentResult) -> dict[str, float]:
    """Tag and value of what is known: of the best head, of the best layer, and means over all heads."""
    found = {f"alignment/{name}_mean": float(result.quantity(name).nanmean()) for name in _SHAPE}
    best = result.best_head()
    if best is not None:
        found |= {f"alignment/{name}": float(result.quantity(name)[best]) for name in _GOLD}
        found["alignment/error_rate_layer"] = result.best_layer_error()
    return {tag: value for tag, value in found.items() if value == value}  # NaN is not itself


def quantity_pictures(result: AlignmentResult, writer: BackgroundWriter) -> dict[str, Future[Picture]]:
    """Draw every quantity that some head has, layers down and heads across, in the background."""
    drawn = {}
    for name in ALIGNMENT_QUANTITIES:
        values = result.quantity(name)
        if not values.isnan().all():
            draw = partial(layer_head_grid, values.numpy(), title=f"alignment: {name}", layer_labels=result.layer_names)
            drawn[f"alignment/heads/{name}"] = writer.submit(draw)
    return drawn


def append_alignment(path: Path, epoch: int, step: int, result: AlignmentResult) -> None:
    """Append a row a layer, head and quantity to a CSV file."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(_COLUMNS)
        writer.writerows((epoch, step, *row) for row in _rows(result))


def _rows(result: AlignmentResult) -> Iterator[tuple[str, int, str, float, float | str]]:
    for label, means, errors in zip(result.layer_names, result.mean, result.standard_error, strict=True):
        for head, (values, own) in enumerate(zip(means.tolist(), errors.tolist(), strict=True)):
            for name, value, error in zip(ALIGNMENT_QUANTITIES, values, own, strict=True):
                if value == value:
                    yield label, head, name, value, error if error == error else ""
