"""A page with panels: headings, a legend of roles, and grids of layers and heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from attn_callbacks.functional.role_labels import ROLE_LABELS
from attn_callbacks.render.canvas import GREY, MARGIN, Canvas
from attn_callbacks.render.matrix import draw_cells
from attn_callbacks.render.roles import role_colours
from attn_callbacks.render.text import short_number, text_width

if TYPE_CHECKING:
    from examples.heads_of_minilm import Found

__all__ = ["CELL", "GAP", "HEAD", "LABEL", "LINE", "TEXT", "Page", "legend", "paled", "thousandths"]

CELL, LABEL, GAP = (30, 46), 64, 60
TITLE, TEXT = 17, 14
HEAD, LINE = 66, 22  # room above the cells of a panel; a line of a list

MEANING: Mapping[str, str] = {
    "sink": "rests on the first token",
    "previous": "previous token",
    "next": "next token",
    "self": "the token itself",
    "separator": "the separator",
    "special": "special tokens",
    "duplicate": "same token elsewhere",
    "diagonal": "token and neighbours",
    "local": "at most 4 away",
    "long_range": "far away",
    "vertical": "one key for all",
    "uniform": "everywhere alike",
    "class_gather": "class token gathers",
    "heterogeneous": "none of these",
}

Reals = NDArray[np.floating[Any]]
Table = Sequence[Sequence[str]]


class Page(Canvas):
    """White page of two columns.

    Args:
        height: Height in pixels.
        width: Width in pixels.
        column: Width of a column.
    """

    def __init__(self, height: int, width: int, column: int) -> None:
        super().__init__(height, width)
        self.column = column

    def heading(self, found: Found, present: Sequence[str], legend: Sequence[tuple[int, int]]) -> None:
        """Write what the page is about, and the colours of the roles."""
        first, last = found.looks[0], found.looks[-1]
        heads, samples = len(found.pairs.heads), last.study.importance.samples
        self.text(MARGIN, MARGIN, f"What the {heads} attention heads of a language model do, and which it needs", 26)
        learned = f"It learns to tell positive from negative sentences: accuracy {first.accuracy:.2f} before, "
        seen = f"{last.accuracy:.2f} after. Looked at on {samples} sentences that it does not learn from. "
        text = f"{learned}{seen}Rows: layers, the input is at the top. Columns: heads."
        self.text(MARGIN + 40, MARGIN, text, TEXT, colour=GREY)
        for name, (left, line) in zip(present, legend, strict=True):
            top = MARGIN + 70 + LINE * line
            self.pixels[top + 1 : top + 15, left : left + 14] = _colour(name)
            self.text(top, left + 20, _explained(name), TEXT)

    def panel(self, top: int, side: int, title: str, caption: str) -> int:
        """Write the head of a panel and return its left edge."""
        left = MARGIN + side * (self.column + GAP)
        self.text(top, left, title, TITLE, width=self.column)
        self.text(top + 22, left, caption, TEXT - 1, width=self.column, colour=GREY)
        return left

    def grid(
        self, top: int, left: int, colours: NDArray[np.uint8], texts: Table, absent: NDArray[np.bool_] | None = None
    ) -> None:
        """Draw layers down and heads across."""
        layers, heads = colours.shape[:2]
        start = top + HEAD
        draw_cells(self, start, left + LABEL, colours, CELL, texts=texts, absent=absent)
        for head in range(heads):
            place = left + LABEL + head * CELL[1]
            self.text(start - 17, place, str(head), width=CELL[1], align="center", colour=GREY)
        for layer in range(layers):
            self.text(start + layer * CELL[0] + 8, left, f"layer {layer}", width=LABEL - 8, align="right")


def legend(names: Sequence[str], width: int) -> list[tuple[int, int]]:
    places, left, line = [], MARGIN, 0
    for name in names:
        room = 20 + text_width(_explained(name), TEXT)
        if left + room > width - MARGIN:
            left, line = MARGIN, line + 1
        places.append((left, line))
        left += room + 28
    return places


def _explained(name: str) -> str:
    return f"{name}: {MEANING[name]}" if name in MEANING else name


def _colour(name: str) -> NDArray[np.uint8]:
    return role_colours(np.array(ROLE_LABELS.index(name)), ROLE_LABELS)


def paled(colours: NDArray[np.uint8], sure: NDArray[np.bool_]) -> NDArray[np.uint8]:
    pale = (colours.astype(np.int64) + 2 * 255) // 3
    return np.where(sure[..., None], colours, pale).astype(np.uint8)


def thousandths(values: Reals) -> list[list[str]]:
    return [[short_number(round(1000 * float(value), 1)) for value in row] for row in values]
