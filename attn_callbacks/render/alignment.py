"""One alignment of two sentences: weights as colours, gold links as frames, predicted links as dots."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from attn_callbacks._checks import check_axes
from attn_callbacks.render.canvas import MARGIN, SMALL, Canvas, header_height, header_width, ink_on, widest
from attn_callbacks.render.matrix import draw_cells, shades
from attn_callbacks.render.palettes import sequential
from attn_callbacks.render.picture import Picture

__all__ = ["alignment_picture"]

LABEL_ROOM = 120  # longest token in pixels
LARGEST, SMALLEST, MOST = 24, 13, 1500  # pixels of a cell, and of all cells side by side
GOLD = np.array((213, 94, 0), np.uint8)


def alignment_picture(
    weights: NDArray[np.floating],
    source_tokens: Sequence[str],
    target_tokens: Sequence[str],
    *,
    sure: NDArray[np.bool_] | None = None,
    possible: NDArray[np.bool_] | None = None,
    links: NDArray[np.bool_] | None = None,
    title: str = "",
) -> Picture:
    r"""Draw how the tokens of a target sentence attend to those of its source.

    Colours follow the square root of a weight, so that small weights show beside large ones; one always has the
    brightest colour, so that pictures can be compared.

    Args:
        weights: Cross-attention weights in ``[0, 1]``; NaN is drawn as zero.
        source_tokens: Text of each source token, below the columns.
        target_tokens: Text of each target token, left of the rows.
        sure: Gold links without doubt, which get a frame.
        possible: Gold links that may or may not be there, which get the corners of one.
        links: Predicted links, which get a dot.
        title: Heading of the picture.

    Shape:
        - weights, sure, possible, links: ``(target tokens, source tokens)``

    Raises:
        ValueError: If an array has another shape or an empty axis, or a list of tokens another length.

    Example:
        >>> words, sure = ["das", "Haus"], np.eye(2, dtype=bool)
        >>> alignment_picture(np.eye(2), words, ["the", "house"], sure=sure, title="head 0").png()[:4]
        b'\x89PNG'
    """
    weights = np.asarray(weights)
    check_axes("weights", weights, 2)
    _check_sizes(weights, source_tokens, target_tokens, {"sure": sure, "possible": possible, "links": links})
    rows, columns = weights.shape
    side = max(SMALLEST, min(LARGEST, MOST // max(rows, columns)))
    left = MARGIN + widest(list(target_tokens), SMALL, LABEL_ROOM) + 8
    below = widest(list(source_tokens), SMALL, LABEL_ROOM) + 8
    caption = _caption(sure is not None, possible is not None, links is not None)
    top = header_height(title)
    width = max(left + columns * side + MARGIN, header_width(title, caption))
    canvas = Canvas(top + rows * side + below + MARGIN, width)
    canvas.header(title, caption, sequential(), (0.0, 0.25, 1.0))
    colours = shades(np.sqrt(np.nan_to_num(weights.astype(np.float64)).clip(0, 1)), 0.0, 1.0, sequential())
    draw_cells(canvas, top, left, colours, (side, side))
    for marks, draw in ((possible, _corners), (sure, _frame)):
        for row, column in _places(marks):
            draw(canvas.pixels[top + row * side :, left + column * side :][: side - 1, : side - 1])
    for row, column in _places(links):
        _dot(canvas.pixels[top + row * side :, left + column * side :][: side - 1, : side - 1], colours[row, column])
    _draw_tokens(canvas, (top, left), source_tokens, target_tokens, side)
    return Picture(canvas.pixels)


def _check_sizes(
    weights: NDArray[np.floating],
    source_tokens: Sequence[str],
    target_tokens: Sequence[str],
    marks: dict[str, NDArray[np.bool_] | None],
) -> None:
    if weights.size == 0:
        raise ValueError(f"`weights` must hold at least one weight, got shape {weights.shape}.")
    sides = (("target_tokens", target_tokens, 0, "row"), ("source_tokens", source_tokens, 1, "column"))
    for name, tokens, axis, each in sides:
        if len(tokens) != weights.shape[axis]:
            expected = f"`{name}` must hold one entry per {each} ({weights.shape[axis]})"
            raise ValueError(f"{expected}, got {len(tokens)}.")
    for name, mark in marks.items():
        if mark is not None and mark.shape != weights.shape:
            raise ValueError(f"`{name}` must have the shape of `weights` {weights.shape}, got {mark.shape}.")


def _caption(sure: bool, possible: bool, links: bool) -> str:
    parts = ["rows: target, columns: source"]
    parts += ["frame: gold link"] * sure + ["corners: possible link"] * possible + ["dot: predicted link"] * links
    return ", ".join(parts)


def _places(marks: NDArray[np.bool_] | None) -> list[tuple[int, int]]:
    return [] if marks is None else [(int(row), int(column)) for row, column in np.argwhere(marks)]


def _frame(cell: NDArray[np.uint8]) -> None:
    """Draw a frame two pixels wide along the inner edge of a cell, in place."""
    cell[:2], cell[-2:], cell[:, :2], cell[:, -2:] = GOLD, GOLD, GOLD, GOLD


def _corners(cell: NDArray[np.uint8]) -> None:
    """Draw the corners of such a frame."""
    inside, reach = cell.copy(), max(4, len(cell) // 3)
    _frame(cell)
    cell[reach:-reach], cell[:, reach:-reach] = inside[reach:-reach], inside[:, reach:-reach]


def _dot(cell: NDArray[np.uint8], colour: NDArray[np.uint8]) -> None:
    middle, reach = len(cell) // 2, max(2, len(cell) // 7)
    cell[middle - reach : middle + reach, middle - reach : middle + reach] = ink_on(colour)


def _draw_tokens(
    canvas: Canvas, corner: tuple[int, int], source_tokens: Sequence[str], target_tokens: Sequence[str], side: int
) -> None:
    top, left = corner
    for row, token in enumerate(target_tokens):
        place = top + row * side + (side - 15) // 2
        canvas.text(place, MARGIN, token, width=left - MARGIN - 8, align="right")
    bottom = top + len(target_tokens) * side + 5
    for column, token in enumerate(source_tokens):
        canvas.upright(bottom, left + column * side + (side - 15) // 2, token, height=LABEL_ROOM)
