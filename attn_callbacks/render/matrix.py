"""A matrix of coloured cells with what they hold printed inside."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from attn_callbacks.render.canvas import SMALL, Canvas, hatched, ink_on
from attn_callbacks.render.text import line_height, text_width

__all__ = ["draw_cells", "fits", "shades"]


def shades(values: NDArray[np.floating], low: float, high: float, palette: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the colour of each value, from ``low`` at the first to ``high`` at the last colour of ``palette``.

    Shape:
        - values: ``(...)``; NaN takes the first colour
        - output: ``(..., 3)``; ``uint8``
    """
    share = (values - low) / (high - low) if high > low else np.zeros(values.shape)
    return np.asarray(palette[np.rint(np.nan_to_num(share).clip(0, 1) * (len(palette) - 1)).astype(np.intp)])


def draw_cells(
    canvas: Canvas,
    top: int,
    left: int,
    colours: NDArray[np.uint8],
    cell: tuple[int, int],
    *,
    texts: Sequence[Sequence[str]] = (),
    absent: NDArray[np.bool_] | None = None,
) -> None:
    """Draw the cells, hatched where ``absent``, each with its text; several lines are parted by a line end.

    Shape:
        - colours: ``(rows, columns, 3)``; ``uint8``
        - absent: ``(rows, columns)``
    """
    height, width = cell
    rows, columns = colours.shape[:2]
    canvas.pixels[top : top + rows * height, left : left + columns * width] = colours.repeat(height, 0).repeat(width, 1)
    for row, column in np.argwhere(absent) if absent is not None else ():
        y, x = top + row * height, left + column * width
        canvas.pixels[y : y + height, x : x + width] = hatched(height, width)
    if min(height, width) >= 8:  # a line of the page between cells
        for row in range(1, rows):
            canvas.pixels[top + row * height - 1, left : left + columns * width] = 255
        for column in range(1, columns):
            canvas.pixels[top : top + rows * height, left + column * width - 1] = 255
    for row, line in enumerate(texts):
        for column, text in enumerate(line):
            _print(canvas, (top + row * height, left + column * width), text, cell, colours[row, column])


def fits(texts: Sequence[Sequence[str]], cell: tuple[int, int]) -> bool:
    """Tell whether every text has room in a cell of this height and width."""
    parts = {part for line in texts for text in line for part in text.split("\n")}
    lines = max((text.count("\n") + 1 for line in texts for text in line), default=1)
    widest = max((text_width(part, SMALL) for part in parts), default=0)
    return widest + 6 <= cell[1] and lines * line_height(SMALL) + 4 <= cell[0]


def _print(
    canvas: Canvas, corner: tuple[int, int], text: str, cell: tuple[int, int], colour: NDArray[np.uint8]
) -> None:
    parts = text.split("\n")
    step = line_height(SMALL) + 1
    top = corner[0] + (cell[0] - step * len(parts)) // 2
    for line, part in enumerate(parts):
        canvas.text(top + line * step, corner[1], part, width=cell[1] - 1, align="center", colour=ink_on(colour))
