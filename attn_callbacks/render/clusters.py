"""Clusters of heads: the matrix of distances below its tree, the heads in a plane, and a colour for each cluster."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from attn_callbacks._checks import check_axes
from attn_callbacks.render.canvas import GREY, INK, MARGIN, SMALL, Canvas, header_height, header_width, widest
from attn_callbacks.render.matrix import draw_cells, shades
from attn_callbacks.render.palettes import head_colours, sequential
from attn_callbacks.render.picture import Picture
from attn_callbacks.render.text import text_width

__all__ = ["cluster_colours", "cluster_layout", "cluster_matrix"]

NONE = (176, 180, 184)  # a head without a cluster
STRIP, TREE, LABEL_ROOM, LINE = 10, 120, 80, 13
MOST = 1008  # pixels of a matrix, as long as a cell keeps two of them: 6 x 12 heads have their names
MOST_NAMES = 300  # heads in a plane; no name of more would find room
PLANE, RADIUS = 560, 5


def cluster_colours(labels: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Return the colour of each head's cluster, wherever heads are drawn; grey for -1, a head without a cluster.

    Clusters have the colours that heads have in :func:`~attn_callbacks.render.head_colours`, in their order.

    Shape:
        - labels: any
        - output: that of ``labels``, and an axis of 3; ``uint8``

    Example:
        >>> cluster_colours(np.array([[0, 1], [0, -1]]))[:, 1].tolist()
        [[86, 180, 233], [176, 180, 184]]
    """
    labels = np.asarray(labels)
    palette = np.concatenate([head_colours(max(int(labels.max(initial=0)) + 1, 1)), np.array([NONE], np.uint8)])
    return np.asarray(palette[labels])


def cluster_matrix(
    distances: NDArray[np.floating],
    labels: NDArray[np.integer],
    linkage: NDArray[np.floating],
    order: NDArray[np.integer],
    *,
    names: Sequence[str] | None = None,
    title: str = "",
) -> Picture:
    r"""Draw distances between heads in the order of their tree, with the tree above and cluster colours at two edges.

    Args:
        distances: Distance of each pair, from 0 to 1; NaN is drawn hatched.
        labels: Cluster of each head.
        linkage: The tree, as scipy writes it.
        order: Heads from left to right below the tree.
        names: Name of each head, drawn where cells are large enough; ``None`` numbers them.
        title: Heading of the picture.

    Shape:
        - distances: ``(heads, heads)``
        - labels, order: ``(heads,)``
        - linkage: ``(heads - 1, 4)``

    Raises:
        ValueError: If shapes do not fit, or ``order`` does not name each head once.

    Example:
        >>> distances = np.array([[0.0, 0.1], [0.1, 0.0]])
        >>> tree = np.array([[0, 1, 0.1, 2]])
        >>> cluster_matrix(distances, np.array([0, 0]), tree, np.array([0, 1])).png()[:4]
        b'\x89PNG'
    """
    values, leaves = np.asarray(distances, np.float64), np.asarray(order, np.int64)
    _check_matrix(values, labels, linkage, leaves, names)
    heads = len(values)
    texts = [str(head) for head in range(heads)] if names is None else list(names)
    cell = max(2, min(26, MOST // heads))
    room = widest(texts, SMALL, LABEL_ROOM) + 6 if cell >= LINE else 0
    caption = f"{heads} heads, order and tree by distance"
    top, left = header_height(title) + TREE + STRIP + 4, MARGIN + room + STRIP + 4
    width = max(left + heads * cell + MARGIN, header_width(title, caption))
    canvas = Canvas(top + heads * cell + room + MARGIN, width)
    known = values[~np.eye(heads, dtype=bool) & np.isfinite(values)]
    highest = float(known.max()) if known.size else 0.0
    canvas.header(title, caption, sequential(), (0.0, highest / 2, highest))
    sorted_values = values[np.ix_(leaves, leaves)]
    shown = shades(sorted_values, 0.0, highest, sequential())
    draw_cells(canvas, top, left, shown, (cell, cell), absent=~np.isfinite(sorted_values))
    colours = cluster_colours(np.asarray(labels)[leaves]).repeat(cell, axis=0)
    canvas.pixels[top - STRIP - 2 : top - 2, left : left + heads * cell] = colours
    canvas.pixels[top : top + heads * cell, left - STRIP - 2 : left - 2] = colours[:, None]
    _draw_tree(canvas, np.asarray(linkage, np.float64), leaves, (top - STRIP - 6, left), cell)
    for row, head in enumerate(leaves if room else ()):
        place = row * cell + (cell - LINE - 2) // 2
        canvas.text(top + place, MARGIN, texts[head], width=room - 4, align="right")
        canvas.upright(top + heads * cell + 6, left + place, texts[head], height=room - 6)
    return Picture(canvas.pixels)


def cluster_layout(
    places: NDArray[np.floating],
    labels: NDArray[np.integer],
    *,
    names: Sequence[str] | None = None,
    title: str = "",
    caption: str = "heads near each other look at the same keys",
) -> Picture:
    r"""Draw heads as dots in a plane, in the colours of their clusters. Both axes have one scale.

    Args:
        places: Place of each head; a head with NaN is left out.
        labels: Cluster of each head.
        names: Name of each head, written beside its dot where there is room; ``None`` numbers them.
        title: Heading of the picture.
        caption: What the plane shows.

    Shape:
        - places: ``(heads, 2)``
        - labels: ``(heads,)``

    Raises:
        ValueError: If shapes do not fit.

    Example:
        >>> cluster_layout(np.array([[0.0, 0.0], [1.0, 0.5]]), np.array([0, 1])).png()[:4]
        b'\x89PNG'
    """
    points, labels = np.asarray(places, np.float64), np.asarray(labels)
    if points.ndim != 2 or points.shape[1] != 2 or not len(points) or len(labels) != len(points):
        raise ValueError(f"`places` must have shape (heads, 2) with one label each, got {points.shape}, {len(labels)}.")
    if names is not None and len(names) != len(points):
        raise ValueError(f"`names` must hold one entry per head ({len(points)}), got {len(names)}.")
    texts = [str(head) for head in range(len(points))] if names is None else list(names)
    top = MARGIN + (28 if title else 0) + 22
    canvas = Canvas(top + PLANE + MARGIN, max(PLANE + 2 * MARGIN, header_width(title, caption)))
    canvas.text(MARGIN - 3, MARGIN, title, 17)
    canvas.text(top - 22, MARGIN, caption, colour=GREY, width=canvas.pixels.shape[1] - 2 * MARGIN)
    taken = np.zeros(canvas.pixels.shape[:2], dtype=bool)
    spots = _pixels(points, top)
    for (y, x), colour in zip(spots, cluster_colours(labels), strict=True):
        if y >= 0:
            _dot(canvas, y, x, colour)
            taken[y - RADIUS : y + RADIUS + 1, x - RADIUS : x + RADIUS + 1] = True
    for (y, x), text in zip(spots, texts, strict=True) if len(texts) <= MOST_NAMES else ():
        if y >= 0:
            _name(canvas, taken, y, x, text)
    return Picture(canvas.pixels)


def _draw_tree(
    canvas: Canvas, linkage: NDArray[np.float64], order: NDArray[np.int64], corner: tuple[int, int], cell: int
) -> None:
    """Draw each merge as a bridge over its two parts, as high as they are apart."""
    heads, (bottom, left) = len(order), corner
    scale = (TREE - 8) / max(float(linkage[:, 2].max(initial=0.0)), 1e-12)
    column = {int(head): left + place * cell + cell // 2 for place, head in enumerate(order)}
    row = dict.fromkeys(range(heads), bottom)
    for number, (one, other, height, _) in enumerate(linkage):
        ends = sorted((column[int(part)], row[int(part)]) for part in (one, other))
        level = bottom - round(height * scale)
        canvas.pixels[level, ends[0][0] : ends[1][0] + 1] = INK
        for x, y in ends:
            canvas.pixels[min(level, y) : max(level, y) + 1, x] = INK
        column[heads + number], row[heads + number] = (ends[0][0] + ends[1][0]) // 2, level


def _pixels(points: NDArray[np.float64], top: int) -> list[tuple[int, int]]:
    """Return row and column of each dot, -1 for one without a place."""
    known = np.asarray(np.isfinite(points).all(axis=1))
    low = points[known].min(axis=0) if known.any() else np.zeros(2)
    spread = float((points[known] - low).max()) if known.any() else 0.0
    room = PLANE - 60
    share = (np.nan_to_num(points) - low) / (spread or 1.0)
    spots = np.rint(share * room).astype(int) + 20
    return [
        (top + PLANE - int(y), MARGIN + int(x)) if ok else (-1, -1) for (x, y), ok in zip(spots, known, strict=True)
    ]


def _dot(canvas: Canvas, y: int, x: int, colour: NDArray[np.uint8]) -> None:
    steps = np.arange(-RADIUS, RADIUS + 1)
    square = steps[:, None] ** 2 + steps**2
    region = canvas.pixels[y - RADIUS : y + RADIUS + 1, x - RADIUS : x + RADIUS + 1]
    region[square <= RADIUS**2] = GREY
    region[square <= (RADIUS - 1) ** 2] = colour


def _name(canvas: Canvas, taken: NDArray[np.bool_], y: int, x: int, text: str) -> None:
    """Write a name to the right of its dot, or the left, above or below, wherever nothing stands yet."""
    width = text_width(text, SMALL)
    for top, left in ((y - 7, x + 8), (y - 7, x - 8 - width), (y - 21, x - width // 2), (y + 6, x - width // 2)):
        box = taken[max(top, 0) : top + LINE, max(left, 0) : left + width]
        if left >= 0 and left + width <= taken.shape[1] and not box.any():
            canvas.text(top, left, text)
            box[:] = True
            return


def _check_matrix(
    distances: NDArray[np.float64],
    labels: NDArray[np.integer],
    linkage: NDArray[np.floating],
    order: NDArray[np.int64],
    names: Sequence[str] | None,
) -> None:
    check_axes("distances", distances, 2)
    heads = len(distances)
    if distances.shape != (heads, heads) or not heads:
        raise ValueError(f"`distances` must have shape (heads, heads), got {distances.shape}.")
    if np.shape(linkage) != (heads - 1, 4):
        raise ValueError(f"`linkage` must have shape (heads - 1, 4) = {(heads - 1, 4)}, got {np.shape(linkage)}.")
    if not np.isfinite(linkage).all():
        raise ValueError("`linkage` must hold finite numbers. Leave out heads whose distances are not known.")
    if sorted(order.tolist()) != list(range(heads)):
        raise ValueError(f"`order` must name each of the {heads} heads once, got {order.tolist()}.")
    for name, given in (("labels", labels), ("names", names)):
        if given is not None and len(given) != heads:
            raise ValueError(f"`{name}` must hold one entry per head ({heads}), got {len(given)}.")
