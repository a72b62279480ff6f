"""One number for every pair of heads: a matrix with lines between layers or clusters."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import numpy as np
from numpy.typing import NDArray

from attn_callbacks.render import palettes
from attn_callbacks.render.canvas import INK, MARGIN, SMALL, Canvas, header_height, header_width, widest
from attn_callbacks.render.matrix import draw_cells, fits, shades
from attn_callbacks.render.picture import Picture
from attn_callbacks.render.text import short_number

__all__ = ["pair_matrix"]

LABEL_ROOM, STRIP, LINE_HEIGHT = 160, 10, 15
MOST = 900  # pixels of a side, as long as a cell keeps two of them
CAPTION = "each cell: a pair of heads"


def pair_matrix(
    values: NDArray[np.floating],
    *,
    title: str = "",
    caption: str = CAPTION,
    parts: Sequence[int] | None = None,
    part_labels: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    colours: NDArray[np.uint8] | None = None,
    low: float | None = None,
    high: float | None = None,
    diverging: bool = False,
) -> Picture:
    r"""Draw one value for every pair of heads, printed where it fits.

    Heads come in the order of the rows: for another one, such as that of a dendrogram, sort ``values`` first. The
    matrix need not be symmetric.

    Args:
        values: Value of each pair; NaN, drawn hatched, for what was not measured or means nothing.
        title: Heading of the picture.
        caption: What a cell says, and which sign means what.
        parts: Numbers of heads that belong together, a layer or a cluster each; a line is drawn between them.
        part_labels: Name of each part.
        labels: Name of each head, drawn where cells are large enough; ``None`` numbers the heads of each part.
        colours: A colour for each head, drawn as a strip beside it.
        low: Value of the first colour; ``None`` takes the smallest value, or minus ``high`` when diverging.
        high: Value of the last colour; ``None`` takes the largest value, in size when diverging.
        diverging: Whether colours part at zero.

    Shape:
        - values: ``(heads, heads)``
        - colours: ``(heads, 3)``; ``uint8``

    Raises:
        ValueError: If ``values`` is not square or empty, or the other arguments do not fit to it.

    Example:
        >>> redundancy = np.array([[np.nan, 0.7], [0.7, np.nan]])
        >>> pair_matrix(redundancy, title="interaction", parts=[1, 1], diverging=True).png()[:4]
        b'\x89PNG'
    """
    numbers: NDArray[np.float64] = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 2 or numbers.shape[0] != numbers.shape[1] or numbers.size == 0:
        raise ValueError(f"`values` must have shape (heads, heads), got {numbers.shape}.")
    heads = len(numbers)
    sizes = [heads] if parts is None else [int(size) for size in parts]
    _check(sizes, heads, part_labels, labels, colours)
    own = [str(head) for size in sizes for head in range(size)] if labels is None else [str(text) for text in labels]
    names = ["" for _ in sizes] if part_labels is None else [str(name) for name in part_labels]
    ends = _ends(numbers, low, high, diverging)
    palette = palettes.diverging() if diverging else palettes.sequential()
    frame = _Frame(heads, sizes, names, own, colours, title)
    canvas = Canvas(frame.top + heads * frame.cell + MARGIN, max(frame.width, header_width(title, caption)))
    canvas.header(title, caption, palette, (ends[0], sum(ends) / 2, ends[1]))
    texts = _texts(numbers, frame.cell) if frame.cell >= LINE_HEIGHT else []
    shown, absent = shades(numbers, *ends, palette), ~np.isfinite(numbers)
    draw_cells(canvas, frame.top, frame.left, shown, (frame.cell, frame.cell), texts=texts, absent=absent)
    frame.draw(canvas)
    return Picture(canvas.pixels)


class _Frame:
    """What stands around the cells: names of parts and heads, colours, and the lines between parts."""

    def __init__(
        self,
        heads: int,
        sizes: list[int],
        names: list[str],
        labels: list[str],
        colours: NDArray[np.uint8] | None,
        title: str,
    ) -> None:
        self.sizes, self.names, self.labels, self.colours = sizes, names, labels, colours
        self.heads = heads
        self.cell = max(2, min(48, MOST // heads))
        self.named = self.cell >= LINE_HEIGHT
        self.part_room = widest(names, SMALL, LABEL_ROOM) + 8 if any(names) else 0
        self.label_room = widest(labels, SMALL, LABEL_ROOM) + 8 if self.named else 0
        self.strip = 0 if colours is None else STRIP + 4
        self.top = header_height(title) + self.label_room + self.strip
        self.left = MARGIN + self.part_room + self.label_room + self.strip
        self.width = self.left + heads * self.cell + MARGIN

    def draw(self, canvas: Canvas) -> None:
        """Draw it."""
        self._draw_lines(canvas)
        self._draw_parts(canvas)
        for head, label in enumerate(self.labels if self.named else ()):
            middle = (self.cell - LINE_HEIGHT) // 2
            row, column = self.top + head * self.cell + middle, self.left + head * self.cell + middle
            left = MARGIN + self.part_room
            canvas.text(row, left, label, width=self.label_room - 8, align="right")
            bottom = self.top - self.strip - 4
            canvas.upright(max(0, bottom - widest([label], SMALL, LABEL_ROOM)), column, label, height=LABEL_ROOM)
        for head, colour in enumerate(self.colours if self.colours is not None else ()):
            begin, end = head * self.cell, (head + 1) * self.cell
            canvas.pixels[self.top - self.strip : self.top - 4, self.left + begin : self.left + end] = colour
            canvas.pixels[self.top + begin : self.top + end, self.left - self.strip : self.left - 4] = colour

    def _draw_lines(self, canvas: Canvas) -> None:
        length = self.heads * self.cell
        for place in np.cumsum(self.sizes)[:-1] * self.cell - 1:
            canvas.pixels[self.top + place, self.left : self.left + length] = INK
            canvas.pixels[self.top : self.top + length, self.left + place] = INK

    def _draw_parts(self, canvas: Canvas) -> None:
        height = int(np.mean(self.sizes) * self.cell)
        every = ceil(LINE_HEIGHT / max(1, height))
        for part in range(0, len(self.names) if self.part_room else 0, every):
            begin = sum(self.sizes[:part]) * self.cell
            middle = self.top + begin + (self.sizes[part] * self.cell - LINE_HEIGHT) // 2
            canvas.text(middle, MARGIN, self.names[part], width=self.part_room - 8, align="right")


def _texts(values: NDArray[np.float64], cell: int) -> list[list[str]]:
    """Return every value, if there is room for all."""
    texts = [[short_number(value) if np.isfinite(value) else "" for value in line] for line in values]
    return texts if fits(texts, (cell, cell)) else []


def _check(
    sizes: list[int],
    heads: int,
    part_labels: Sequence[str] | None,
    labels: Sequence[str] | None,
    colours: NDArray[np.uint8] | None,
) -> None:
    if sum(sizes) != heads or min(sizes) < 1:
        raise ValueError(f"`parts` must hold numbers of heads that add up to {heads}, got {sizes}.")
    lists = (("part_labels", part_labels, len(sizes), "part"), ("labels", labels, heads, "head"))
    for name, given, length, each in (*lists, ("colours", colours, heads, "head")):
        if given is not None and len(given) != length:
            raise ValueError(f"`{name}` must hold one entry per {each} ({length}), got {len(given)}.")


def _ends(values: NDArray[np.float64], low: float | None, high: float | None, diverging: bool) -> tuple[float, float]:
    known = values[np.isfinite(values)]
    known = known if known.size else np.zeros(1)
    if diverging:
        high = float(np.abs(known).max()) if high is None else high
        return -high if low is None else low, high
    return float(known.min()) if low is None else low, float(known.max()) if high is None else high
