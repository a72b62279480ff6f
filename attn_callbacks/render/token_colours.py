"""A text as a web page whose tokens have the colour of a value each; as a picture it is `token_strip`."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attn_callbacks._checks import check_axes
from attn_callbacks.render.canvas import ink_on
from attn_callbacks.render.matrix import shades
from attn_callbacks.render.palettes import diverging, sequential
from attn_callbacks.render.text import short_number

__all__ = ["token_html"]

Array = NDArray[Any]

_PAGE = (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title></head>\n'
    '<body style="font:16px/1.9 sans-serif;margin:24px;max-width:60em;background:#fff;color:#202124">\n'
    "<h1 style=\"font-size:18px\">{title}</h1>\n<p>{words}</p>\n<p style=\"color:#70757a\">{caption}</p>\n"
    "</body></html>\n"
)  # fmt: skip
_WORD = (
    '<span style="background:{colour};color:{ink};padding:2px 4px;white-space:pre-wrap" title="{number}">{text}</span>'
)


def token_html(values: Array, labels: Sequence[str], *, title: str = "", high: float | None = None) -> str:
    """Write the tokens as a line of text, each on the colour of its value, which shows below the pointer.

    The page loads nothing and runs nothing; what tokens hold is escaped. Values below zero get colours that part at
    zero, blue below and rust above; else colours follow the square root of a value, as in `token_strip`.

    Args:
        values: Value of each token; NaN counts as zero.
        labels: Text of each token.
        title: Heading of the page.
        high: Size of the value of the strongest colour; ``None`` takes the largest one.

    Shape:
        - values: ``(tokens,)``

    Returns:
        A whole page, to be written as UTF-8.

    Raises:
        ValueError: If ``values`` has other axes or is empty, or ``labels`` has another length.

    Example:
        >>> page = token_html(np.array([0.1, 0.9]), ["<script>", "film"])
        >>> "<script>" in page, "&lt;script&gt;" in page
        (False, True)
    """
    numbers = np.nan_to_num(np.asarray(values, np.float64))
    check_axes("values", numbers, 1)
    if not len(numbers) or len(labels) != len(numbers):
        raise ValueError(f"`labels` must hold one text per value ({len(numbers)}, at least 1), got {len(labels)}.")
    top = float(np.abs(numbers).max()) if high is None else high
    signed = bool(numbers.min() < 0)
    if signed:
        colours = shades(numbers, -top, top, diverging())
    else:
        colours = shades(np.sqrt(numbers), 0.0, max(top, 0.0) ** 0.5, sequential())
    words = "\n".join(_word(*each) for each in zip(labels, numbers.tolist(), colours, strict=True))
    ends = f"from {short_number(-top if signed else 0.0)} to {short_number(top)}"
    return _PAGE.format(title=_safe(title), words=words, caption=f"Colours {ends}; point at a token for its value.")


def _word(label: str, value: float, colour: NDArray[np.uint8]) -> str:
    ink = ink_on(colour)
    return _WORD.format(colour=_code(colour), ink=_code(ink), number=short_number(value), text=_safe(label))


def _code(colour: Sequence[int] | NDArray[np.uint8]) -> str:
    return "#" + "".join(f"{int(part):02x}" for part in colour)


def _safe(text: str) -> str:
    """Escape what would be markup, and put spaces for what no page may hold."""
    return escape("".join(character if character.isprintable() else " " for character in text), quote=True)
