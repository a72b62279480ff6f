"""PNG files must decode, with somebody else's decoder, to exactly the pixels that went in."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image

from attn_callbacks.render import Picture
from attn_callbacks.render.png import encode
from tests.render.decoding import decoded

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (200, 301)])
@pytest.mark.parametrize("colours", [1, 7, 256])
def test_palette_round_trip(size, colours):
    palette = RNG.integers(0, 256, (colours, 3), dtype=np.uint8)
    picture = Picture(RNG.integers(0, colours, size, dtype=np.uint8), palette)
    np.testing.assert_array_equal(decoded(picture), palette[picture.pixels])
    np.testing.assert_array_equal(picture.rgb(), palette[picture.pixels])
    assert (picture.height, picture.width) == size


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (64, 90)])
def test_colour_round_trip(size):
    picture = Picture(RNG.integers(0, 256, (*size, 3), dtype=np.uint8))
    np.testing.assert_array_equal(decoded(picture), picture.pixels)


def test_views_are_encoded_as_they_look():
    wide = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decoded(Picture(wide[::2, ::-3])), wide[::2, ::-3])


def test_colour_types():
    indexed = encode(np.zeros((2, 3), np.uint8), np.zeros((1, 3), np.uint8))
    assert struct.unpack(">IIBB", indexed[16:26]) == (3, 2, 8, 3)
    assert encode(np.zeros((2, 3, 3), np.uint8))[25] == 2
    assert Image.open(io.BytesIO(indexed)).mode == "P"


@pytest.mark.parametrize(
    ("pixels", "palette", "error", "message"),
    [
        (np.zeros((2, 2)), None, TypeError, "`pixels` must be uint8, got float64"),
        (np.zeros((2, 2), np.uint8), np.zeros((1, 3)), TypeError, "`palette` must be uint8, got float64"),
        (np.zeros((2, 2), np.uint8), None, ValueError, r"`pixels` must have shape \(height, width, 3\), got \(2, 2\)"),
        (np.zeros((2, 2, 4), np.uint8), None, ValueError, r"`pixels` must have shape \(height, width, 3\)"),
        (np.zeros((0, 2, 3), np.uint8), None, ValueError, "`pixels` must not be empty"),
        (np.zeros((2, 2, 3), np.uint8), np.zeros((1, 3), np.uint8), ValueError, r"shape \(height, width\), got"),
        (np.zeros((2, 2), np.uint8), np.zeros((257, 3), np.uint8), ValueError, "1 to 256 colours"),
        (np.full((2, 2), 3, np.uint8), np.zeros((3, 3), np.uint8), ValueError, "into 3 colours, got index 3"),
    ],
)
def test_checks(pixels, palette, error, message):
    with pytest.raises(error, match=message):
        Picture(pixels, palette)
