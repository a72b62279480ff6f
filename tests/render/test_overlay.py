"""Relevance over an image: the image stays beside it, light falls where the relevance is."""

from __future__ import annotations

import numpy as np
import pytest

from attn_callbacks.render import overlay, sequential
from attn_callbacks.render.canvas import MARGIN
from attn_callbacks.render.overlay import _spread
from tests.render.decoding import decoded


def interpolated(values, height, width):
    """Bilinear interpolation, one pixel at a time."""
    rows, columns = values.shape
    result = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            v = min(max((y + 0.5) * rows / height - 0.5, 0), rows - 1)
            u = min(max((x + 0.5) * columns / width - 0.5, 0), columns - 1)
            i, j = min(int(v), max(rows - 2, 0)), min(int(u), max(columns - 2, 0))
            k, m = min(i + 1, rows - 1), min(j + 1, columns - 1)
            upper = values[i, j] * (1 - (u - j)) + values[i, m] * (u - j)
            lower = values[k, j] * (1 - (u - j)) + values[k, m] * (u - j)
            result[y, x] = upper * (1 - (v - i)) + lower * (v - i)
    return result


@pytest.mark.parametrize(("patches", "size"), [((2, 3), (8, 7)), ((1, 1), (4, 4)), ((5, 5), (5, 5)), ((7, 7), (3, 4))])
def test_interpolation_against_loops(patches, size):
    values = np.random.default_rng(0).uniform(size=patches)
    np.testing.assert_allclose(_spread(values, *size), interpolated(values, *size))


def test_the_image_stands_beside():
    image = np.random.default_rng(0).integers(0, 256, (64, 32, 3), dtype=np.uint8)
    shown = decoded(overlay(image, np.ones((2, 2))))
    np.testing.assert_array_equal(shown[:, :128], image.repeat(4, axis=0).repeat(4, axis=1))
    assert shown.shape == (256, 2 * 128 + 8, 3)


def test_light_falls_where_the_relevance_is():
    relevance = np.zeros((4, 4))
    relevance[0, 3] = 0.2  # the scale is relative
    shown = decoded(overlay(np.full((256, 256, 3), 0.5), relevance))[:, 264:].astype(int).sum(axis=-1)
    y, x = np.unravel_index(shown.argmax(), shown.shape)
    assert y < 64
    assert x >= 192
    assert shown[200, 50] < shown[y, x] - 200


def test_strength():
    image, relevance = np.random.default_rng(0).uniform(size=(256, 256)), np.eye(4)
    full = decoded(overlay(image, relevance, strength=1.0))[:, 264:]
    assert full[0, 0].tolist() == sequential()[-1].tolist()
    none = decoded(overlay(image, relevance, strength=0.0))
    assert np.abs(none[:, 264:].astype(int) - none[:, :256]).max() <= 1


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1), (8, 8, 3), (1, 1, 3), (30, 500, 3), (900, 1300, 3), (3000, 40)])
def test_image_shapes(shape):
    picture = overlay(np.full(shape, 0.25), np.ones((3, 5)))
    assert picture.width <= 1600
    assert picture.height <= 768
    assert (picture.rgb()[:, :1] == 64).all()


def test_floats_of_a_normalised_image_are_stretched():
    image = np.linspace(-2.1, 2.6, 256 * 256).reshape(256, 256)
    shown = overlay(image, np.ones((1, 1))).rgb()
    assert shown[0, 0].tolist() == [0, 0, 0]
    assert shown[-1, 255].tolist() == [255, 255, 255]


def test_relevance_of_nothing():
    for relevance in (np.zeros((2, 2)), np.full((2, 2), np.nan), -np.ones((2, 2))):
        assert overlay(np.ones((4, 4)), relevance).rgb().shape == (256, 520, 3)


def test_checks():
    with pytest.raises(ValueError, match=r"`image` must have shape \(height, width, 3\), got \(3, 8, 8\)"):
        overlay(np.zeros((3, 8, 8)), np.ones((2, 2)))
    with pytest.raises(ValueError, match=r"`relevance` must have 2 axes, got shape \(4,\)"):
        overlay(np.zeros((8, 8)), np.ones(4))
    with pytest.raises(ValueError, match=r"`strength` must lie between 0.0 and 1.0, got 2"):
        overlay(np.zeros((8, 8)), np.ones((2, 2)), strength=2)


def test_a_title_states_what_the_brightest_light_is():
    image, relevance = np.full((64, 64, 3), 0.5), np.diag([0.125, 0.0625])
    plain, titled = decoded(overlay(image, relevance)), decoded(overlay(image, relevance, title="sample 3"))
    top, left = titled.shape[0] - plain.shape[0] - MARGIN, MARGIN
    np.testing.assert_array_equal(titled[top : top + plain.shape[0], left : left + plain.shape[1]], plain)
    other = decoded(overlay(image, 2 * relevance, title="sample 3"))
    np.testing.assert_array_equal(other[top:], titled[top:])  # the same light
    assert (other[:top] != titled[:top]).any()  # and another number at the end of the bar
