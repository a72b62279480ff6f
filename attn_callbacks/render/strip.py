"""A text whose tokens have the colour of a value each: what a token of it came from, or what decided."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attn_callbacks._checks import check_axes
from attn_callbacks.render.canvas import GREY, MARGIN, SMALL, Canvas, header_height, header_width, ink_on, widest
from attn_callbacks.render.matrix import shades
from attn_callbacks.render.palettes import sequential
from attn_callbacks.render.picture import Picture
from attn_callbacks.render.text import line_height, short_number, text_width

__all__ = ["token_strip"]

PAGE_WIDTH = 900  # before the text wraps
LABEL_ROOM = 120  # longest token in pixels
FRAME = (213, 94, 0)  # of the token that is asked about

Array = NDArray[Any]


def token_strip(
    values: Array, labels: Sequence[str], *, target: int | None = None, title: str = "", high: float | None = None
) -> Picture:
    r"""Draw the tokens as a line of text, each in the colour of its value, which stands below it.

    Colours follow the square root of a value, so that the many small ones show beside the few large ones.

    Args:
        values: Value of each token, at least zero; NaN counts as zero.
        labels: Text of each token.
        target: The token that the values are about: framed, and left out of the choice of ``high``.
        title: Heading of the picture.
        high: Value of the brightest colour; ``None`` takes the largest one of the other tokens.

    Shape:
        - values: ``(tokens,)``

    Raises:
        ValueError: If ``values`` has other axes or is empty, ``labels`` has another length, or ``target`` is none of
            the tokens.

    Example:
        >>> token_strip(np.array([0.1, 0.9]), ["good", "film"], target=0).png()[:4]
        b'\x89PNG'
    """
    numbers = np.nan_to_num(np.asarray(values, np.float64))
    check_axes("values", numbers, 1)
    tokens = len(numbers)
    if not tokens or len(labels) != tokens:
        raise ValueError(f"`labels` must hold one text per value ({tokens}, at least 1), got {len(labels)}.")
    if target is not None and not 0 <= target < tokens:
        raise ValueError(f"`target` must lie between 0 and {tokens - 1}, got {target}.")
    others = np.delete(numbers, [] if target is None else [target])
    top_value = high if high is not None else float(others.max()) if others.size else float(numbers.max())
    texts = [short_number(float(value)) for value in numbers]
    boxes = _boxes([max(widest([pair[0]], SMALL, LABEL_ROOM), text_width(pair[1], SMALL)) + 10
                    for pair in zip(labels, texts, strict=True)])  # fmt: skip
    caption = "value below each token" + ("" if target is None else ", framed: the token asked about")
    top, line = header_height(title), line_height(SMALL)
    width = max(header_width(title, caption), max(box[1] + box[2] for box in boxes) + MARGIN)
    canvas = Canvas(top + (boxes[-1][0] + 1) * _pitch() + MARGIN, width)
    canvas.header(title, caption, sequential(), (0.0, top_value / 4, top_value))
    colours = shades(np.sqrt(numbers.clip(0.0)), 0.0, max(top_value, 0.0) ** 0.5, sequential())
    for token, (row, left, room) in enumerate(boxes):
        y = top + row * _pitch()
        _fill(canvas, y, left, (line + 8, room), FRAME if token == target else tuple(colours[token]))
        _fill(canvas, y + 2, left + 2, (line + 4, room - 4), tuple(colours[token]))
        canvas.text(y + 4, left, labels[token], width=room, align="center", colour=ink_on(colours[token]))
        canvas.text(y + line + 9, left, texts[token], width=room, align="center", colour=GREY)
    return Picture(canvas.pixels)


def _boxes(widths: list[int]) -> list[tuple[int, int, int]]:
    """Return row, left edge and width of each box of a text that wraps."""
    boxes, row, left = [], 0, MARGIN
    for width in widths:
        if left > MARGIN and left + width > PAGE_WIDTH:
            row, left = row + 1, MARGIN
        boxes.append((row, left, width))
        left += width + 3
    return boxes


def _pitch() -> int:
    return 2 * line_height(SMALL) + 16


def _fill(canvas: Canvas, top: int, left: int, size: tuple[int, int], colour: tuple[int, ...]) -> None:
    canvas.pixels[top : top + size[0], left : left + size[1]] = colour
