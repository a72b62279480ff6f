"""Where the maps of many heads go: how many side by side, how large, with or without room for labels."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log

from attn_callbacks.render.canvas import MARGIN

__all__ = ["FRAME", "GAP", "LABEL_CELL", "MAX_WIDTH", "TITLE", "Layout", "arrange"]

MAX_WIDTH, MAX_HEIGHT = 1600, 2200
GAP = 12
FRAME = 4  # three pixels in the colour of the head and one of the page, so that dark frames show around dark maps
LABEL_CELL = 13  # pixels a cell needs for a label beside it
TITLE = 18  # line above a panel

SMALLEST_PANEL = 16


@dataclass(frozen=True)
class Layout:
    """A wrapped grid of equal panels.

    Args:
        columns: Panels side by side.
        rows: Rows of panels.
        cell: Pixels of one attention weight, each way.
        queries: Rows of a map, after pooling.
        keys: Columns of a map, after pooling.
        label_width: Room for query labels, left of each row of panels.
        label_height: Room for key labels, below the last panel of each column.
        header: Room above the panels.
    """

    columns: int
    rows: int
    cell: int
    queries: int
    keys: int
    label_width: int
    label_height: int
    header: int

    @property
    def panel_width(self) -> int:
        """Width of a panel with its frame."""
        return self.keys * self.cell + 2 * FRAME

    @property
    def panel_height(self) -> int:
        """Height of a panel with its frame, without its title."""
        return self.queries * self.cell + 2 * FRAME

    @property
    def width(self) -> int:
        """Width of the picture, wide enough for the header."""
        across = self.columns * (self.panel_width + GAP) - GAP
        return max(2 * MARGIN + self.label_width + across, 420)

    @property
    def height(self) -> int:
        """Height of the picture."""
        return self.header + self.rows * (TITLE + self.panel_height + GAP) - GAP + self.label_height + MARGIN

    def corner(self, index: int) -> tuple[int, int]:
        """Return top and left of the frame of panel ``index``, below its title."""
        row, column = divmod(index, self.columns)
        top = self.header + row * (TITLE + self.panel_height + GAP) + TITLE
        return top, MARGIN + self.label_width + column * (self.panel_width + GAP)


def arrange(
    heads: int,
    queries: int,
    keys: int,
    *,
    labels: tuple[int, int] = (0, 0),
    cell: int | None = None,
    header: int = 70,
) -> Layout:
    """Choose the number of columns, the cell size and, where even one pixel a weight is too much, the pooled size.

    Args:
        heads: Number of maps.
        queries: Rows of a map.
        keys: Columns of a map.
        labels: Width of the query labels and height of the key labels. They are kept where cells are large enough.
        cell: Pixels of one weight; ``None`` chooses.
        header: Room above the panels.

    Returns:
        The layout whose cells are readable and whose shape is nearest to a screen's.
    """
    if any(labels):
        labelled = _best(heads, (queries, keys), (*labels, header), 14, cell)
        if labelled.cell >= LABEL_CELL and (labelled.queries, labelled.keys) == (queries, keys):
            return labelled
    readable = max(1, min(14, ceil(160 / max(queries, keys))))
    return _best(heads, (queries, keys), (0, 0, header), readable, cell)


def _best(heads: int, size: tuple[int, int], room: tuple[int, int, int], readable: int, cell: int | None) -> Layout:
    most = max(1, min(heads, MAX_WIDTH // (SMALLEST_PANEL + GAP)))
    options = [_with_columns(columns, heads, size, room, readable, cell) for columns in range(1, most + 1)]

    def quality(layout: Layout) -> tuple[bool, int, float]:
        empty = (layout.columns * layout.rows - heads) / heads
        odd = abs(log(layout.width / layout.height / 1.4)) + empty
        return (layout.queries, layout.keys) == size, min(layout.cell, readable), -odd

    return max(options, key=quality)


def _with_columns(
    columns: int, heads: int, size: tuple[int, int], room: tuple[int, int, int], readable: int, cell: int | None
) -> Layout:
    rows = ceil(heads / columns)
    across = (MAX_WIDTH - 2 * MARGIN - room[0] + GAP) // columns - GAP - 2 * FRAME
    down = (MAX_HEIGHT - room[2] - MARGIN - room[1] + GAP) // rows - GAP - TITLE - 2 * FRAME
    across, down = max(across, SMALLEST_PANEL), max(down, SMALLEST_PANEL)
    queries, keys = size
    largest = max(readable, ceil(64 / max(size)), min(24, ceil(240 / max(size))))
    chosen = max(1, min(across // keys, down // queries, largest)) if cell is None else cell
    spans = ceil(queries / max(1, down // chosen)), ceil(keys / max(1, across // chosen))
    if queries == keys:
        spans = max(spans), max(spans)  # the diagonal stays a diagonal
    return Layout(columns, rows, chosen, ceil(queries / spans[0]), ceil(keys / spans[1]), *room)
