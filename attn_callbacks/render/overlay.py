"""Relevance laid over the picture it belongs to."""

from __future__ import annotations

from math import ceil

import numpy as np
from numpy.typing import NDArray

from attn_callbacks._checks import check_axes, in_range
from attn_callbacks.render.canvas import MARGIN, Canvas, header_height, header_width
from attn_callbacks.render.matrix import shades
from attn_callbacks.render.palettes import sequential
from attn_callbacks.render.picture import Picture

__all__ = ["overlay"]

SMALLEST, LARGEST, GAP = 256, 768, 8  # pixels of the longer side, and between the two pictures


def overlay(
    image: NDArray[np.uint8] | NDArray[np.floating],
    relevance: NDArray[np.floating],
    *,
    strength: float = 0.6,
    title: str = "",
) -> Picture:
    r"""Draw an image, and beside it the same image with relevance as light: what counts shines, the rest dims.

    Args:
        image: Colours or greys, ``uint8`` or floats in ``[0, 1]``. Floats outside are stretched to that range, as are
            images that were normalised for a network. Small images are enlarged, large ones shrunk.
        relevance: Relevance of each patch, from zero; the largest is the brightest. NaN counts as zero.
        strength: Share of the light in the mixture, from 0 (image only) to 1 (relevance only).
        title: Heading of the picture; with one, a colour bar says what the brightest light stands for.

    Shape:
        - image: ``(height, width, 3)``, ``(height, width, 1)`` or ``(height, width)``
        - relevance: ``(rows, columns)``, spread over the image by bilinear interpolation

    Raises:
        ValueError: If a shape does not fit or ``strength`` lies outside ``[0, 1]``.

    Example:
        >>> overlay(np.zeros((8, 8, 3)), np.eye(2)).rgb().shape
        (256, 520, 3)
    """
    in_range("strength", strength, 0.0, 1.0)
    check_axes("relevance", relevance, 2)
    colours = _sized(_as_colours(np.asarray(image)))
    height, width = colours.shape[:2]
    light = _spread(np.nan_to_num(np.asarray(relevance, np.float64)).clip(min=0), height, width)
    share = light / light.max() if light.max() > 0 else light
    grey = colours @ np.array([0.299, 0.587, 0.114])
    base = 0.5 * colours + 0.5 * grey[..., None]  # less colour below, so that the light's colours stand out
    mixed = (1 - strength) * base + strength * shades(share, 0.0, 1.0, sequential()) / 255
    pair = np.ones((height, 2 * width + GAP, 3))
    pair[:, :width], pair[:, width + GAP :] = colours, mixed
    pixels = (pair * 255).round().clip(0, 255).astype(np.uint8)
    return Picture(_titled(pixels, title, float(light.max())) if title else pixels)


def _titled(pixels: NDArray[np.uint8], title: str, most: float) -> NDArray[np.uint8]:
    """Put a heading and a colour bar above the pictures."""
    top, (height, width) = header_height(title), pixels.shape[:2]
    caption = "of a patch; the brightest is the largest here"
    canvas = Canvas(top + height + MARGIN, max(width + 2 * MARGIN, header_width(title, caption)))
    canvas.header(title, caption, sequential(), (0.0, most))
    canvas.pixels[top : top + height, MARGIN : MARGIN + width] = pixels
    return canvas.pixels


def _as_colours(image: NDArray[np.uint8] | NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the image as ``(height, width, 3)`` in ``[0, 1]``."""
    image = image[..., None] if image.ndim == 2 else image
    if image.ndim != 3 or image.shape[2] not in (1, 3) or image.size == 0:
        raise ValueError(f"`image` must have shape (height, width, 3), got {image.shape}. Move the channels last.")
    if image.dtype == np.uint8:
        colours = image / 255.0
    else:
        colours = np.nan_to_num(np.asarray(image, np.float64))
        low, high = min(0.0, float(colours.min())), max(1.0, float(colours.max()))
        if low < 0.0 or high > 1.0:
            low, high = float(colours.min()), float(colours.max())
            colours = (colours - low) / (high - low if high > low else 1.0)
    return np.broadcast_to(colours, (*image.shape[:2], 3))


def _sized(image: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the image enlarged, or averaged over blocks, by a whole factor."""
    longer = max(image.shape[:2])
    if longer > LARGEST:
        step = ceil(longer / LARGEST)
        for axis in (0, 1):
            starts = np.arange(0, image.shape[axis], step)
            counts = np.diff(np.append(starts, image.shape[axis]))
            image = np.add.reduceat(image, starts, axis=axis) / np.expand_dims(counts, (1 - axis, 2))
        return image
    factor = max(1, SMALLEST // longer)
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def _spread(values: NDArray[np.float64], height: int, width: int) -> NDArray[np.float64]:
    """Interpolate ``values`` bilinearly to ``(height, width)``; each value sits in the middle of its patch."""
    return _mixing(values.shape[0], height) @ values @ _mixing(values.shape[1], width).T


def _mixing(patches: int, pixels: int) -> NDArray[np.float64]:
    """Return how much of each patch every pixel takes, ``(pixels, patches)``."""
    place = ((np.arange(pixels) + 0.5) * patches / pixels - 0.5).clip(0, patches - 1)
    return np.asarray(np.clip(1 - np.abs(place[:, None] - np.arange(patches)), 0, None))
