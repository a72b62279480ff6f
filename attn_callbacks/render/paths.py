"""The paths of a token over the layers, as lines in the colours of their heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from attn_callbacks._checks import check_axes
from attn_callbacks.render.canvas import (
    GREY,
    INK,
    MARGIN,
    SMALL,
    Canvas,
    header_width,
    widest,
)
from attn_callbacks.render.palettes import head_colours
from attn_callbacks.render.picture import Picture
from attn_callbacks.render.text import line_height, text_width

__all__ = ["token_paths"]

LABEL_ROOM = 120  # longest token in pixels
ROW, MOST_ROWS = 20, 48  # height of a token's row, and rows from which on only tokens on a path are shown
STEP = 84  # from one layer to the next
THICKEST = 9.0
HEADING = 17  # font size in pixels

Array = NDArray[Any]
Point = tuple[int, int]


def token_paths(
    tokens: Array, heads: Array, weights: Array, *, labels: Sequence[str] | None = None, count: int, title: str = ""
) -> Picture:
    r"""Draw the paths of a token from the inputs at the left to the last layer at the right.

    A line is as thick as the paths that take it weigh together, in the colour of its head; the residual connection is
    grey. Of many tokens, only those on a path are shown.

    Args:
        tokens: Positions on each path, that of the last layer first.
        heads: Head of each step, that of the last layer first; -1 for the residual connection.
        weights: Weight of each path, as a share of all there are.
        labels: Text of each token; ``None`` numbers them.
        count: Number of tokens.
        title: Heading of the picture.

    Shape:
        - tokens: ``(paths, layers + 1)``
        - heads: ``(paths, layers)``
        - weights: ``(paths,)``

    Raises:
        ValueError: If shapes do not fit, there is no path, or a position is none of the tokens.

    Example:
        >>> steps = np.array([[1, 0], [1, 1]]), np.array([[3], [-1]]), np.array([0.2, 0.5])
        >>> token_paths(*steps, labels=["good", "film"], count=2).png()[:4]
        b'\x89PNG'
    """
    tokens, heads = np.asarray(tokens), np.asarray(heads)
    weights = np.nan_to_num(np.asarray(weights, np.float64), posinf=0.0, neginf=0.0)
    check_axes("tokens", tokens, 2)
    paths, nodes = tokens.shape
    if heads.shape != (paths, nodes - 1) or weights.shape != (paths,) or not tokens.size:
        raise ValueError(
            f"`heads` and `weights` must have shapes {(paths, nodes - 1)} and {(paths,)} for at least one path, got "
            f"{heads.shape} and {weights.shape}."
        )
    if tokens.min() < 0 or tokens.max() >= count or (labels is not None and len(labels) != count):
        raise ValueError(f"`tokens` and `labels` must be about {count} tokens.")
    names = [str(number) for number in range(count)] if labels is None else list(labels)
    shown = np.arange(count) if count <= MOST_ROWS else np.unique(tokens)
    plan = _plan([names[token] for token in shown], nodes, title)
    used = sorted(set(heads.ravel().tolist()) - {-1})
    caption = f"{paths} paths, {100 * float(weights.sum()):.3g} % of all; grey: residual"
    width = max(plan.width, header_width(title, caption))
    legend = _legend(used, width)
    height = plan.top + len(shown) * ROW + (legend[-1][1] + 1 if legend else 0) * ROW + MARGIN
    canvas = Canvas(height, width)
    canvas.text(MARGIN - 3, MARGIN, title, HEADING, width=canvas.pixels.shape[1] - 2 * MARGIN)
    canvas.text(plan.top - 44, MARGIN, caption, width=canvas.pixels.shape[1] - 2 * MARGIN, colour=GREY)
    _draw_axes(canvas, plan, nodes)
    places = {int(token): row for row, token in enumerate(shown)}
    colours = head_colours(max(used, default=0) + 1)
    _draw_lines(canvas, plan, places, _edges(tokens, heads, weights), colours, float(weights.sum()))
    _draw_legend(canvas, plan.top + len(shown) * ROW + 6, legend, colours)
    return Picture(canvas.pixels)


class _Plan(NamedTuple):
    """Where things are: first row, column of the inputs, width, and the labels of the rows."""

    top: int
    left: int
    width: int
    names: list[str]


class _Edge(NamedTuple):
    column: int  # of its lower end; 0: the inputs
    below: int
    above: int
    head: int
    weight: float


def _fill(canvas: Canvas, top: int, left: int, size: tuple[int, int], colour: tuple[int, ...]) -> None:
    canvas.pixels[top : top + size[0], left : left + size[1]] = colour


def _plan(names: list[str], nodes: int, title: str) -> _Plan:
    room = widest(names, SMALL, LABEL_ROOM)
    left = MARGIN + room + 12
    return _Plan(MARGIN + 50 + (HEADING + 8) * bool(title), left, left + (nodes - 1) * STEP + 12 + room + MARGIN, names)


def _edges(tokens: Array, heads: Array, weights: Array) -> list[_Edge]:
    """Join the steps that several paths share; the weakest first, to be drawn below the others."""
    layers = heads.shape[1]
    found: dict[tuple[int, int, int, int], float] = {}
    for path, weight in enumerate(weights.tolist()):
        for step in range(layers):
            key = (layers - 1 - step, int(tokens[path, step + 1]), int(tokens[path, step]), int(heads[path, step]))
            found[key] = found.get(key, 0.0) + weight
    return sorted((_Edge(*key, weight) for key, weight in found.items()), key=lambda edge: edge.weight)


def _draw_axes(canvas: Canvas, plan: _Plan, nodes: int) -> None:
    right = plan.left + (nodes - 1) * STEP
    for column in range(nodes):
        name = "inputs" if column == 0 else f"layer {column - 1}"
        left = plan.left + column * STEP - STEP // 2
        canvas.text(plan.top - 20, left, name, width=STEP, align="center", colour=GREY)
    for row, name in enumerate(plan.names):
        top = plan.top + row * ROW + (ROW - line_height(SMALL)) // 2
        canvas.text(top, MARGIN, name, width=plan.left - MARGIN - 12, align="right")
        canvas.text(top, right + 12, name, width=plan.left - MARGIN - 12, colour=GREY)
        for column in range(nodes):
            _dot(canvas, plan, row, column)


def _dot(canvas: Canvas, plan: _Plan, row: int, column: int) -> None:
    y, x = plan.top + row * ROW + ROW // 2, plan.left + column * STEP
    _fill(canvas, y - 1, x - 1, (2, 2), (189, 193, 198))


def _draw_lines(
    canvas: Canvas, plan: _Plan, places: dict[int, int], edges: list[_Edge], colours: Array, total: float
) -> None:
    for edge in edges:
        thickness = 1.0 + (THICKEST - 1.0) * (edge.weight / total if total > 0 else 0.0) ** 0.5
        colour = GREY if edge.head < 0 else tuple(int(part) for part in colours[edge.head])
        below, above = (plan.top + places[token] * ROW + ROW // 2 for token in (edge.below, edge.above))
        left = plan.left + edge.column * STEP
        _line(canvas, (below, left), (above, left + STEP), thickness, colour)


def _line(canvas: Canvas, start: Point, end: Point, thickness: float, colour: tuple[int, ...]) -> None:
    """Draw a line with smooth edges: ink falls off with the distance from it."""
    reach = int(thickness) + 2
    top, left = min(start[0], end[0]) - reach, min(start[1], end[1]) - reach
    region = canvas.pixels[top : max(start[0], end[0]) + reach, left : max(start[1], end[1]) + reach]
    y, x = np.mgrid[: region.shape[0], : region.shape[1]]
    along = np.array(end, np.float64) - start
    off = np.stack([y + top - start[0], x + left - start[1]], axis=-1).astype(np.float64)
    part = (off @ along / (along @ along)).clip(0.0, 1.0)
    distance = np.linalg.norm(off - part[..., None] * along, axis=-1)
    share = (thickness / 2 + 0.5 - distance).clip(0.0, 1.0)[..., None] * 0.85  # lines below shine through
    region[:] = (region * (1 - share) + np.array(colour) * share).round().astype(np.uint8)


def _legend(heads: list[int], width: int) -> list[tuple[int, int, int]]:
    """Return head, row and left edge of each entry."""
    entry = text_width("head 888", SMALL) + 26
    across = max(1, (width - 2 * MARGIN) // entry)
    return [(head, number // across, MARGIN + number % across * entry) for number, head in enumerate(heads)]


def _draw_legend(canvas: Canvas, top: int, legend: list[tuple[int, int, int]], colours: Array) -> None:
    for head, row, left in legend:
        _fill(canvas, top + row * ROW + 3, left, (10, 10), tuple(colours[head]))
        canvas.text(top + row * ROW, left + 15, f"head {head}", colour=INK)
