"""Confusion matrices, of everybody or group by group."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from attn_callbacks.render.canvas import GREY, MARGIN, SMALL, Canvas, header_height, header_width, widest
from attn_callbacks.render.layout import MAX_WIDTH, TITLE
from attn_callbacks.render.matrix import draw_cells, fits, shades
from attn_callbacks.render.palettes import sequential
from attn_callbacks.render.picture import Picture
from attn_callbacks.render.text import short_number

__all__ = ["confusion_picture"]

LABEL_ROOM, GAP = 110, 28
FEW = 8  # classes up to which names stand level below their columns
CAPTION = "rows: true class, columns: predicted class, colour: share of the true class"


def confusion_picture(
    counts: NDArray[np.integer] | NDArray[np.floating],
    class_names: Sequence[str] | None = None,
    title: str = "",
    *,
    group_names: Sequence[str] | None = None,
) -> Picture:
    r"""Draw how often each true class was predicted as which class, as counts and shares of the true class.

    Args:
        counts: Number of samples by true class and predicted class, for all or for each group.
        class_names: Name of each class; ``None`` numbers them.
        title: Heading of the picture.
        group_names: Name of each group; ``None`` numbers them.

    Shape:
        - counts: ``(classes, classes)`` or ``(groups, classes, classes)``; rows are true classes

    Raises:
        ValueError: If ``counts`` has another shape, or a list of names another length.

    Example:
        >>> confusion_picture(np.array([[8, 2], [0, 5]]), ["bad", "good"], "epoch 3").png()[:4]
        b'\x89PNG'
    """
    counts = np.asarray(counts)
    if counts.ndim not in (2, 3) or counts.shape[-1] != counts.shape[-2] or counts.size == 0:
        raise ValueError(f"`counts` must have shape (groups, classes, classes), got {counts.shape}.")
    panels = counts if counts.ndim == 3 else counts[None]
    names = _names("class_names", class_names, panels.shape[-1], "class")
    alone = len(panels) == 1 and group_names is None
    groups = [""] if alone else _names("group_names", group_names, len(panels), "group")
    return Picture(_draw(panels.astype(np.float64), names, groups, title))


def _names(name: str, given: Sequence[str] | None, length: int, each: str) -> list[str]:
    if given is None:
        return [f"{each} {index}" if each == "group" else str(index) for index in range(length)]
    if len(given) != length:
        raise ValueError(f"`{name}` must hold one entry per {each} ({length}), got {len(given)}.")
    return [str(entry) for entry in given]


def _draw(panels: NDArray[np.float64], names: list[str], groups: list[str], title: str) -> NDArray[np.uint8]:
    classes = len(names)
    cell = _cell(names)
    named = cell[1] >= 13
    side = widest(names, SMALL, LABEL_ROOM) + 8 if named else 0
    below = 0 if not named else 22 if classes <= FEW else side
    above = TITLE if any(groups) else 0
    width, height = side + classes * cell[1] + GAP, above + classes * cell[0] + below + 16
    across = max(1, min(len(panels), (MAX_WIDTH - 2 * MARGIN + GAP) // width))
    top = header_height(title)
    rows = -(-len(panels) // across)
    across_width = 2 * MARGIN + across * width - GAP
    canvas = Canvas(top + rows * height, max(across_width, header_width(title, CAPTION)))
    canvas.header(title, CAPTION, sequential(), (0.0, 0.5, 1.0))
    for index, (panel, group) in enumerate(zip(panels, groups, strict=True)):
        down, along = divmod(index, across)
        place = top + down * height + above, MARGIN + along * width + side
        canvas.text(place[0] - TITLE, place[1], group, width=width - side)
        _draw_panel(canvas, place, panel, cell)
        if named:
            _draw_names(canvas, place, names, cell, side)
    return canvas.pixels


def _cell(names: list[str]) -> tuple[int, int]:
    """Return height and width of a cell: two lines of text for few classes, squares for many."""
    if len(names) <= FEW:
        return 46, max(64, widest(names, SMALL, LABEL_ROOM) + 10)
    side = max(1, min(40, 1000 // len(names)))
    return side, side


def _draw_panel(canvas: Canvas, place: tuple[int, int], panel: NDArray[np.float64], cell: tuple[int, int]) -> None:
    support = panel.sum(axis=1, keepdims=True)
    shares = panel / np.where(support > 0, support, 1.0)
    absent = np.broadcast_to(support == 0, panel.shape)
    texts = _texts(panel, shares, cell) if min(cell) >= 20 else []
    draw_cells(canvas, *place, shades(shares, 0.0, 1.0, sequential()), cell, texts=texts, absent=absent)


def _texts(panel: NDArray[np.float64], shares: NDArray[np.float64], cell: tuple[int, int]) -> list[list[str]]:
    """Return count and share of every cell, or the count alone, or nothing, as there is room; zeros stay empty."""
    counts = [[short_number(count) if count else "" for count in line] for line in panel]
    both = [
        [f"{count}\n{100 * share:.0f} %" if count else "" for count, share in zip(*lines, strict=True)]
        for lines in zip(counts, shares, strict=True)
    ]
    return both if fits(both, cell) else counts if fits(counts, cell) else []


def _draw_names(canvas: Canvas, place: tuple[int, int], names: list[str], cell: tuple[int, int], side: int) -> None:
    bottom = place[0] + len(names) * cell[0] + 5
    for index, name in enumerate(names):
        middle = place[0] + index * cell[0] + (cell[0] - 15) // 2
        canvas.text(middle, place[1] - side, name, width=side - 8, align="right")
        start = place[1] + index * cell[1]
        if len(names) <= FEW:
            canvas.text(bottom, start, name, width=cell[1], align="center", colour=GREY)
        else:
            canvas.upright(bottom, start + (cell[1] - 15) // 2, name, height=side - 8)
