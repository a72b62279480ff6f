"""Text lands where it should, the right way round, and never leaves the page."""

from __future__ import annotations

import numpy as np
import pytest

from attn_callbacks.render.canvas import INK, PAGE, Canvas, IndexCanvas, hatched, ink_on
from attn_callbacks.render.text import rasterise


def written(canvas):
    """Return where there is ink."""
    pixels = canvas.pixels if canvas.pixels.ndim == 2 else 255 - canvas.pixels.max(axis=-1)
    return np.argwhere(pixels > 0)


@pytest.mark.parametrize("kind", [Canvas, IndexCanvas])
@pytest.mark.parametrize(("align", "edges"), [("left", (10, None)), ("right", (None, 109)), ("center", (None, None))])
def test_alignment(kind, align, edges):
    canvas = kind(40, 120)
    canvas.text(5, 10, "HH", width=100, align=align)
    left, right = written(canvas)[:, 1].min(), written(canvas)[:, 1].max()
    assert edges[0] is None or abs(left - edges[0]) <= 2
    assert edges[1] is None or abs(right - edges[1]) <= 2
    if align == "center":
        assert abs((left + right) / 2 - 60) <= 1.5


def test_upright_text_reads_from_bottom_to_top_and_ends_at_the_top():
    canvas, ink = Canvas(100, 40), rasterise("L1", 12)
    canvas.upright(7, 3, "L1")
    height, width = ink.shape
    shown = 255 - canvas.pixels[7 : 7 + width, 3 : 3 + height, 0].astype(int)
    expected = np.array([[ink[y, width - 1 - x] for y in range(height)] for x in range(width)])  # a quarter turn left
    np.testing.assert_allclose(shown, expected * ((255.0 - INK[0]) / 255), atol=1)


@pytest.mark.parametrize("kind", [Canvas, IndexCanvas])
@pytest.mark.parametrize("corner", [(-8, 5), (35, 5), (5, -8), (5, 115), (500, 500)])
def test_text_over_the_edge_is_cut(kind, corner):
    canvas = kind(40, 120)
    canvas.text(*corner, "text over the edge")
    canvas.upright(*corner, "text over the edge")
    assert canvas.pixels.shape[:2] == (40, 120)


def test_both_canvases_show_the_same_text():
    colours, indices = Canvas(30, 100), IndexCanvas(30, 100)
    for canvas in (colours, indices):
        canvas.text(5, 5, "same")
    assert np.abs(colours.pixels.astype(int) - indices.ramp()[indices.pixels]).max() <= 8  # half a step of the ramp


def test_ink_contrasts_with_what_is_below():
    assert ink_on(np.array([10, 10, 40], np.uint8)) == PAGE
    assert ink_on(np.array([250, 240, 150], np.uint8)) == INK


def test_hatching_has_two_colours():
    assert len(np.unique(hatched(12, 12).reshape(-1, 3), axis=0)) == 2
