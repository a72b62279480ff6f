"""Roles of heads as colours: which head does what, and how that changed from epoch to epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from attn_callbacks._checks import check_axes
from attn_callbacks.render.canvas import GREY, MARGIN, SMALL, Canvas, widest
from attn_callbacks.render.layers import shared_path, short_layer_names
from attn_callbacks.render.layout import MAX_HEIGHT, MAX_WIDTH
from attn_callbacks.render.matrix import draw_cells, fits
from attn_callbacks.render.palettes import head_colours
from attn_callbacks.render.picture import Picture
from attn_callbacks.render.text import text_width

__all__ = ["role_colours", "role_grid", "role_timeline"]

ABBREVIATIONS: Mapping[str, str] = MappingProxyType(
    {
        "class_gather": "gath",
        "previous": "prev",
        "separator": "sep",
        "duplicate": "dupl",
        "induction": "ind",
        "column": "col",
        "special": "spec",
        "diagonal": "diag",
        "vertical": "vert",
        "local": "loc",
        "long_range": "long",
        "uniform": "unif",
        "heterogeneous": "het",
    }
)
"""What is written into cells for names that are too long for them."""

NOTHING = (206, 208, 212)  # of a head to which no role fits
LABEL_ROOM, SWATCH, LINE = 240, 12, 20
CELL, LOW_CELL, TITLE = (34, 44), (20, 44), 26
MOST_ROWS = 100


def role_colours(labels: NDArray[np.integer], names: Sequence[str]) -> NDArray[np.uint8]:
    """Return the colour of each label, wherever it is drawn; light grey for ``heterogeneous``, and for -1.

    Args:
        labels: Index into ``names``, or -1.
        names: All labels in their order, those of :data:`attn_callbacks.functional.role_labels.ROLE_LABELS`.

    Shape:
        - labels: any
        - output: that of ``labels``, and an axis of 3; ``uint8``

    Example:
        >>> role_colours(np.array([0, 1, -1]), ["previous", "heterogeneous"]).tolist()
        [[230, 159, 0], [206, 208, 212], [206, 208, 212]]
    """
    palette = np.concatenate([head_colours(len(names)), np.array([NOTHING], np.uint8)])
    palette[[number for number, name in enumerate(names) if name == "heterogeneous"]] = NOTHING
    return np.asarray(palette[np.asarray(labels)])


def role_grid(
    labels: NDArray[np.integer],
    names: Sequence[str],
    *,
    strength: NDArray[np.floating] | None = None,
    sure: NDArray[np.bool_] | None = None,
    layer_labels: Sequence[str] | None = None,
    title: str = "",
) -> Picture:
    r"""Draw the role of every head, layers down and heads across, with a legend of the roles that occur.

    Args:
        labels: Index into ``names``; -1 for a head that does not exist or was not measured, drawn hatched.
        names: All labels in their order.
        strength: How strongly each head plays its role, written below the role.
        sure: Where a label is clear; others are drawn pale.
        layer_labels: Name of each layer; ``None`` numbers them.
        title: Heading of the picture.

    Shape:
        - labels, strength, sure: ``(layers, heads)``

    Raises:
        ValueError: If shapes do not fit, or ``labels`` point past ``names``.

    Example:
        >>> role_grid(np.array([[0, 1]]), ["previous", "sink"], strength=np.array([[0.7, 0.4]])).png()[:4]
        b'\x89PNG'
    """
    labels = _checked(labels, names, ("layer_labels", layer_labels))
    rows, shared = short_layer_names(layer_labels, len(labels)), shared_path(layer_labels)
    texts = _abbreviated(labels, names)
    if strength is not None:
        numbers = np.asarray(strength, np.float64)
        texts = [
            [f"{text}\n{value:.2f}" if np.isfinite(value) else text for text, value in zip(line, values, strict=True)]
            for line, values in zip(texts, numbers, strict=True)
        ]
    caption = "rows: layers" + (f" {shared}" if shared else "") + ", columns: heads"
    columns = [str(head) for head in range(labels.shape[1])]
    cell = _cell(labels.shape, CELL if strength is not None else LOW_CELL)
    return _drawn(labels, names, sure, texts, (rows, columns, "head"), cell, (title, caption))


def _cell(shape: tuple[int, ...], largest: tuple[int, int]) -> tuple[int, int]:
    """Return height and width of a cell that leave many layers and heads on a page."""
    layers, heads = shape
    room = MAX_WIDTH - 2 * MARGIN - LABEL_ROOM
    return min(largest[0], max(3, MAX_HEIGHT // layers)), min(largest[1], max(3, room // heads))


def role_timeline(
    labels: NDArray[np.integer],
    names: Sequence[str],
    *,
    heads: Sequence[str],
    epochs: Sequence[int],
    sure: NDArray[np.bool_] | None = None,
    title: str = "",
) -> Picture:
    r"""Draw the roles of some heads over time: heads down, epochs across, the latest as far as there is room.

    Args:
        labels: Index into ``names``; -1 where a head was not measured, drawn hatched.
        names: All labels in their order.
        heads: Name of each head.
        epochs: Epoch of each column.
        sure: Where a label is clear; others are drawn pale.
        title: Heading of the picture.

    Shape:
        - labels, sure: ``(heads, epochs)``

    Raises:
        ValueError: If shapes do not fit, or ``labels`` point past ``names``.

    Example:
        >>> role_timeline(np.array([[0, 1]]), ["sink", "next"], heads=["layer 0 head 3"], epochs=[0, 1]).png()[:4]
        b'\x89PNG'
    """
    labels = _checked(labels, names, ("heads", heads))
    if len(epochs) != labels.shape[1]:
        raise ValueError(f"`epochs` must hold one entry per column ({labels.shape[1]}), got {len(epochs)}.")
    told = [*heads[:MOST_ROWS], "epoch"]
    room = MAX_WIDTH - 2 * MARGIN - 8 - widest(told, SMALL, LABEL_ROOM)
    cell = LOW_CELL[0], max(4, min(LOW_CELL[1], room // labels.shape[1]))
    last = slice(-(room // cell[1]), None)
    labels, epochs = labels[:MOST_ROWS, last], epochs[last]
    sure = None if sure is None else np.asarray(sure)[:MOST_ROWS, last]
    left_out = len(heads) - len(labels)
    caption = "rows: heads" + (f", {left_out} more left out" if left_out else "") + ", columns: epochs, pale: unsure"
    edges = list(heads[:MOST_ROWS]), [str(epoch) for epoch in epochs], "epoch"
    return _drawn(labels, names, sure, _abbreviated(labels, names), edges, cell, (title, caption))


def _drawn(
    labels: NDArray[np.int64],
    names: Sequence[str],
    sure: NDArray[np.bool_] | None,
    texts: list[list[str]],
    edges: tuple[list[str], list[str], str],
    cell: tuple[int, int],
    heading: tuple[str, str],
) -> Picture:
    rows, columns, what = edges
    room = widest([*rows, what], SMALL, LABEL_ROOM) + 8
    left = MARGIN + room
    width = max(left + len(columns) * cell[1] + MARGIN, 560, min(1200, text_width(heading[1], SMALL)) + 2 * MARGIN)
    present = [number for number in range(len(names)) if (labels == number).any()]
    legend = _legend([names[number] for number in present], width)
    start = MARGIN + TITLE * bool(heading[0])
    top = start + LINE + (legend[-1][0] + 1 if legend else 0) * LINE + LINE + 4
    canvas = Canvas(top + len(rows) * cell[0] + MARGIN, width)
    canvas.text(MARGIN - 3, MARGIN, heading[0], 17, width=width - 2 * MARGIN)
    canvas.text(start, MARGIN, heading[1], colour=GREY, width=width - 2 * MARGIN)
    for (line, place), number in zip(legend, present, strict=True):
        y = start + LINE * (line + 1)
        canvas.pixels[y + 2 : y + 2 + SWATCH, place : place + SWATCH] = role_colours(np.array(number), names)
        canvas.text(y, place + SWATCH + 5, names[number])
    colours = role_colours(labels, names)
    if sure is not None:
        pale = (colours.astype(np.int64) + 2 * 255) // 3
        colours = np.where(np.asarray(sure)[..., None], colours, pale).astype(np.uint8)
    shown = texts if fits(texts, cell) else ()
    draw_cells(canvas, top, left, colours, cell, texts=shown, absent=labels < 0)
    _draw_edges(canvas, (top, left), edges, cell)
    return Picture(canvas.pixels)


def _draw_edges(
    canvas: Canvas, corner: tuple[int, int], edges: tuple[list[str], list[str], str], cell: tuple[int, int]
) -> None:
    (top, left), (rows, columns, what) = corner, edges
    for row in range(0, len(rows), -(-13 // cell[0])):
        place = top + row * cell[0] + (cell[0] - 15) // 2
        canvas.text(place, MARGIN, rows[row], width=left - MARGIN - 8, align="right")
    canvas.text(top - LINE + 1, MARGIN, what, width=left - MARGIN - 8, align="right", colour=GREY)
    every = -(-(widest(columns, SMALL, 60) + 6) // cell[1])
    for column in range(0, len(columns), every):
        start = left + column * cell[1] + (cell[1] - 60) // 2
        canvas.text(top - LINE + 1, start, columns[column], width=60, align="center", colour=GREY)


def _legend(names: list[str], width: int) -> list[tuple[int, int]]:
    """Return line and left edge of each name of a legend that wraps."""
    places, line, left = [], 0, MARGIN
    for name in names:
        room = SWATCH + 5 + text_width(name, SMALL)
        if left > MARGIN and left + room > width - MARGIN:
            line, left = line + 1, MARGIN
        places.append((line, left))
        left += room + 16
    return places


def _abbreviated(labels: NDArray[np.int64], names: Sequence[str]) -> list[list[str]]:
    short = [ABBREVIATIONS.get(name, name[:4]) for name in names]
    return [["" if label < 0 else short[label] for label in line] for line in labels.tolist()]


def _checked(
    labels: NDArray[np.integer], names: Sequence[str], rows: tuple[str, Sequence[str] | None]
) -> NDArray[np.int64]:
    numbers = np.asarray(labels, np.int64)
    check_axes("labels", numbers, 2)
    if numbers.size == 0 or numbers.min() < -1 or numbers.max() >= len(names):
        raise ValueError(f"`labels` must hold at least one index into {len(names)} `names`, or -1; got {labels!r}.")
    if rows[1] is not None and len(rows[1]) != len(numbers):
        raise ValueError(f"`{rows[0]}` must hold one entry per row of `labels` ({len(numbers)}), got {len(rows[1])}.")
    return numbers
