"""One number for every head of every layer: layers down, heads across."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor, log10

import numpy as np
from numpy.typing import NDArray

from attn_callbacks._checks import check_axes
from attn_callbacks.render import palettes
from attn_callbacks.render.canvas import GREY, MARGIN, SMALL, Canvas, header_height, header_width, widest
from attn_callbacks.render.layout import MAX_WIDTH
from attn_callbacks.render.matrix import draw_cells, fits, shades
from attn_callbacks.render.picture import Picture

__all__ = ["layer_head_grid", "shared_path", "short_layer_names"]

LABEL_ROOM = 240  # longest layer name in pixels
HEAD_NUMBERS = 20  # height of the line with the numbers of the heads


def layer_head_grid(
    values: NDArray[np.floating],
    *,
    title: str = "",
    layer_labels: Sequence[str] | None = None,
    low: float | None = None,
    high: float | None = None,
    diverging: bool = False,
) -> Picture:
    r"""Draw one value for every layer and head, printed where it fits.

    Args:
        values: Value of each head; NaN for a head that does not exist or was not measured, drawn hatched.
        title: Heading of the picture.
        layer_labels: Name of each layer; what all names share moves to the caption. ``None`` numbers the layers.
        low: Value of the first colour; ``None`` takes the smallest value, or minus ``high`` when diverging.
        high: Value of the last colour; ``None`` takes the largest value, in size when diverging.
        diverging: Whether colours part at zero, for differences and correlations.

    Shape:
        - values: ``(layers, heads)``

    Raises:
        ValueError: If ``values`` has other axes or an empty one, or ``layer_labels`` another length.

    Example:
        >>> layer_head_grid(np.array([[0.1, 0.9], [0.5, np.nan]]), title="entropy").png()[:4]
        b'\x89PNG'
    """
    numbers: NDArray[np.float64] = np.asarray(values, dtype=np.float64)
    check_axes("values", numbers, 2)
    layers, heads = numbers.shape
    if numbers.size == 0:
        raise ValueError(f"`values` must hold at least one value, got shape {numbers.shape}.")
    if layer_labels is not None and len(layer_labels) != layers:
        raise ValueError(f"`layer_labels` must hold one entry per layer ({layers}), got {len(layer_labels)}.")
    names, shared = short_layer_names(layer_labels, layers), shared_path(layer_labels)
    caption = "rows: layers" + (f" {shared}" if shared else "") + ", columns: heads"
    room = widest([*names, "head"], SMALL, LABEL_ROOM) + 8
    texts = _numbers(numbers)
    cell = _cell(layers, heads, room, texts)
    top, left = header_height(title) + HEAD_NUMBERS, MARGIN + room
    width = max(left + heads * cell[1] + MARGIN, header_width(title, caption))
    canvas = Canvas(top + layers * cell[0] + MARGIN, width)
    ends = _ends(numbers, low, high, diverging)
    palette = palettes.diverging() if diverging else palettes.sequential()
    canvas.header(title, caption, palette, (ends[0], sum(ends) / 2, ends[1]))
    colours = shades(numbers, *ends, palette)
    draw_cells(canvas, top, left, colours, cell, texts=texts if fits(texts, cell) else (), absent=~np.isfinite(numbers))
    _draw_names(canvas, top, left, names, heads, cell)
    return Picture(canvas.pixels)


def short_layer_names(labels: Sequence[str] | None, layers: int | None = None) -> list[str]:
    """Return the names of layers without the path that all of them share.

    Args:
        labels: Names of the layers; ``None`` numbers them.
        layers: How many there are, where they have no names.

    Example:
        >>> short_layer_names(["encoder.layer.0.self", "encoder.layer.1.self"])
        ['layer 0', 'layer 1']
    """
    if labels is None:
        return [f"layer {layer}" for layer in range(layers or 0)]
    ahead, behind = _shared(labels)
    if not ahead + behind:
        return list(labels)
    names = [".".join((path := label.split("."))[ahead : len(path) - behind]) for label in labels]
    return [f"layer {name}" if name.isdecimal() else name for name in names]


def shared_path(labels: Sequence[str] | None) -> str:
    """Return the path that the names of all layers share, with a star in the place of the rest; empty for none."""
    ahead, behind = (0, 0) if labels is None else _shared(labels)
    if labels is None or not ahead + behind:
        return ""
    path = labels[0].split(".")
    return ".".join([*path[:ahead], "*", *path[len(path) - behind :]])


def _shared(labels: Sequence[str]) -> tuple[int, int]:
    """Return how many parts all names have in common in front and behind, none if a name has no others."""
    paths = [label.split(".") for label in labels]
    ahead = _common(paths)
    behind = _common([path[ahead:][::-1] for path in paths])
    told = len(paths) > 1 and all(len(path) > ahead + behind for path in paths)
    return (ahead, behind) if told else (0, 0)


def _ends(values: NDArray[np.float64], low: float | None, high: float | None, diverging: bool) -> tuple[float, float]:
    known = values[np.isfinite(values)]
    known = known if known.size else np.zeros(1)
    if diverging:
        high = float(np.abs(known).max()) if high is None else high
        return -high if low is None else low, high
    return float(known.min()) if low is None else low, float(known.max()) if high is None else high


def _cell(layers: int, heads: int, room: int, texts: list[list[str]]) -> tuple[int, int]:
    """Return height and width of a cell: large enough for its number, or small enough for the picture."""
    printed = widest([text for line in texts for text in line], SMALL, 60) + 12
    width = min(max(printed, 36), max(2, (MAX_WIDTH - room - 2 * MARGIN) // heads))
    return max(2, min(26, 2000 // layers)), width


def _numbers(values: NDArray[np.float64]) -> list[list[str]]:
    """Return every value with as many decimals as three digits of the largest need; nothing for NaN."""
    known = np.abs(values[np.isfinite(values)])
    largest = float(known.max()) if known.size else 0.0
    if 0 < largest < 1e-3 or largest >= 1e5:
        return [[f"{value:.0e}" if np.isfinite(value) else "" for value in line] for line in values]
    decimals = min(4, max(0, 2 - floor(log10(largest)))) if largest else 0
    decimals = min(decimals, 2) if largest >= 0.1 else decimals
    return [[f"{value:.{decimals}f}" if np.isfinite(value) else "" for value in line] for line in values]


def _common(paths: list[list[str]]) -> int:
    same = 0
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        same += 1
    return same


def _draw_names(canvas: Canvas, top: int, left: int, names: list[str], heads: int, cell: tuple[int, int]) -> None:
    every = ceil(13 / cell[0])
    for layer in range(0, len(names), every):
        place = top + layer * cell[0] + (cell[0] - 15) // 2
        canvas.text(place, MARGIN, names[layer], width=left - MARGIN - 8, align="right")
    canvas.text(top - HEAD_NUMBERS + 1, MARGIN, "head", width=left - MARGIN - 8, align="right", colour=GREY)
    every = ceil(22 / cell[1])
    for head in range(0, heads, every):
        start = left + head * cell[1] + (cell[1] - 60) // 2
        canvas.text(top - HEAD_NUMBERS + 1, start, str(head), width=60, align="center", colour=GREY)
