"""All heads of a layer side by side, each framed in its own colour, with the tokens where they fit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from attn_callbacks._checks import at_least, check_axes
from attn_callbacks.render.canvas import MARGIN, RAMP, SMALL, IndexCanvas, header_height, header_width, widest
from attn_callbacks.render.layout import FRAME, LABEL_CELL, TITLE, Layout, arrange
from attn_callbacks.render.palettes import head_colours, sequential
from attn_callbacks.render.picture import Picture
from attn_callbacks.render.pooling import pool
from attn_callbacks.render.text import line_height, text_width

__all__ = ["attention_heads"]

LABEL_ROOM = 92  # longest label in pixels


def attention_heads(
    maps: NDArray[np.floating],
    *,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    colours: NDArray[np.uint8] | None = None,
    titles: Sequence[str] | None = None,
    title: str = "",
    cell: int | None = None,
    high: float | None = None,
) -> Picture:
    r"""Draw the attention maps of all heads as one picture.

    Colours follow the square root of a weight, so that the many small weights show beside the few large ones; the
    colour bar says which weight a colour stands for. Maps too long for a screen are pooled, not refused.

    Args:
        maps: Attention weights in ``[0, 1]``; NaN is drawn as zero.
        row_labels: One label a query, drawn left of each row of panels where cells are large enough.
        column_labels: One label a key, drawn below each column of panels where cells are large enough.
        colours: Colour of each head's frame; ``None`` takes :func:`head_colours`.
        titles: What stands above each map; ``None`` numbers the heads.
        title: Heading of the picture.
        cell: Pixels of one weight; ``None`` chooses.
        high: Weight of the brightest colour; ``None`` takes the largest one shown.

    Shape:
        - maps: ``(heads, queries, keys)``
        - colours: ``(heads, 3)``; ``uint8``

    Raises:
        ValueError: If ``maps`` has other axes or an empty one, or a list of labels, titles or colours another length.

    Example:
        >>> picture = attention_heads(np.eye(3)[None], row_labels=["a", "b", "c"], title="layer 0")
        >>> picture.png()[:4]
        b'\x89PNG'
    """
    maps = np.asarray(maps)
    check_axes("maps", maps, 3)
    heads, queries, keys = maps.shape
    if maps.size == 0:
        raise ValueError(f"`maps` must hold at least one weight, got shape {maps.shape}.")
    _check_length("row_labels", row_labels, queries, "query")
    _check_length("column_labels", column_labels, keys, "key")
    _check_length("titles", titles, heads, "head")
    _check_length("colours", colours, heads, "head")
    rows, columns = list(row_labels or []), list(column_labels or [])
    if cell is not None:
        at_least("cell", cell, 1)
    room = (widest(rows, SMALL, LABEL_ROOM) + 6 * bool(rows), widest(columns, SMALL, LABEL_ROOM) + 6 * bool(columns))
    layout = arrange(heads, queries, keys, labels=room, cell=cell, header=header_height(title))
    shown = np.nan_to_num(pool(maps, layout.queries, layout.keys).astype(np.float32, copy=False))
    top_weight = float(shown.max()) if high is None else high
    frames, frame_of = np.unique(
        head_colours(heads) if colours is None else np.asarray(colours, np.uint8), axis=0, return_inverse=True
    )
    levels = 256 - RAMP - len(frames)
    if levels < 32:
        raise ValueError(f"`colours` may hold at most {224 - RAMP} different colours, got {len(frames)}.")
    first = RAMP + len(frames)  # indices: page to ink, frames, weights
    canvas = IndexCanvas(layout.height, max(layout.width, header_width(title)))
    bar = np.arange(first, 256, dtype=np.uint8)
    canvas.header(title, _caption(maps.shape, layout), bar, (0.0, top_weight / 4, top_weight))
    _draw_panels(canvas, layout, _levels(shown, top_weight, levels, first), RAMP + frame_of.ravel())
    _draw_titles(canvas, layout, titles, heads)
    _draw_labels(canvas, layout, rows, columns, heads)
    return Picture(canvas.pixels, np.concatenate([canvas.ramp(), frames, sequential(levels)]))


def _check_length(name: str, values: Sequence[str] | NDArray[np.uint8] | None, length: int, each: str) -> None:
    if values is not None and len(values) != length:
        raise ValueError(f"`{name}` must hold one entry per {each} ({length}), got {len(values)}.")


def _levels(maps: NDArray[np.float32], high: float, levels: int, first: int) -> NDArray[np.uint8]:
    """Return the palette index of each weight, ``(heads, queries, keys)``."""
    share = np.sqrt((maps * (1.0 / high if high > 0 else 1.0)).clip(0.0, 1.0))
    return np.asarray(share * (levels - 1) + (first + 0.5)).astype(np.uint8)


def _caption(shape: tuple[int, ...], layout: Layout) -> str:
    caption = "rows: queries, columns: keys"
    if (layout.queries, layout.keys) != shape[1:]:
        caption += f" · {shape[1]} x {shape[2]} pooled to {layout.queries} x {layout.keys}"
    return caption


def _draw_panels(canvas: IndexCanvas, layout: Layout, indices: NDArray[np.uint8], frames: NDArray[np.integer]) -> None:
    height, width = layout.panel_height, layout.panel_width
    for head, panel in enumerate(indices):
        top, left = layout.corner(head)
        canvas.pixels[top : top + height, left : left + width] = frames[head]
        canvas.pixels[top + 3 : top + height - 3, left + 3 : left + width - 3] = 0
        inside = canvas.pixels[top + FRAME : top + height - FRAME, left + FRAME : left + width - FRAME]
        inside[:] = panel.repeat(layout.cell, axis=0).repeat(layout.cell, axis=1)


def _draw_titles(canvas: IndexCanvas, layout: Layout, titles: Sequence[str] | None, heads: int) -> None:
    words = layout.panel_width >= text_width(f"head {heads}", SMALL)
    for head in range(heads):
        top, left = layout.corner(head)
        name = titles[head] if titles is not None else f"head {head}" if words else str(head)
        canvas.text(top - TITLE + 2, left, name, SMALL, width=layout.panel_width)


def _draw_labels(canvas: IndexCanvas, layout: Layout, rows: list[str], columns: list[str], heads: int) -> None:
    if layout.cell < LABEL_CELL:
        return
    offset = FRAME + (layout.cell - line_height(SMALL)) // 2
    for panel in range(0, heads if layout.label_width else 0, layout.columns):
        top, left = layout.corner(panel)
        for index, label in enumerate(rows):
            place = top + offset + index * layout.cell
            canvas.text(place, MARGIN, label, SMALL, width=layout.label_width - 6, align="right")
    for panel in range(max(0, heads - layout.columns), heads if layout.label_height else 0):
        top, left = layout.corner(panel)
        for index, label in enumerate(columns):
            place = left + offset + index * layout.cell
            canvas.upright(top + layout.panel_height + 6, place, label, height=layout.label_height - 6)
