"""A finished picture: pixels and the ways to hand them on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attn_callbacks.render.png import encode

__all__ = ["Picture"]


@dataclass(frozen=True, eq=False)
class Picture:
    """Pixels, either as indices into a palette of at most 256 colours or as colours.

    Args:
        pixels: Colour indices or, without a palette, colours.
        palette: Colours the indices point to.

    Shape:
        - pixels: ``(height, width)`` with a palette, else ``(height, width, 3)``; ``uint8``
        - palette: ``(colours, 3)``; ``uint8``

    Raises:
        TypeError: If an array is not ``uint8``.
        ValueError: If the shapes do not fit, the picture is empty or an index points past the palette.

    Example:
        >>> picture = Picture(np.array([[0, 1]], np.uint8), np.array([[0, 0, 0], [255, 0, 0]], np.uint8))
        >>> picture.rgb().tolist()
        [[[0, 0, 0], [255, 0, 0]]]
    """

    pixels: NDArray[np.uint8]
    palette: NDArray[np.uint8] | None = None

    def __post_init__(self) -> None:
        pixels, palette = self.pixels, self.palette
        for name, array in (("pixels", pixels), ("palette", palette)):
            if array is not None and array.dtype != np.uint8:
                raise TypeError(f"`{name}` must be uint8, got {array.dtype}.")
        shape = "(height, width, 3)" if palette is None else "(height, width)"
        if pixels.ndim != (3 if palette is None else 2) or (palette is None and pixels.shape[2] != 3):
            raise ValueError(f"`pixels` must have shape {shape}, got {pixels.shape}.")
        if pixels.size == 0:
            raise ValueError(f"`pixels` must not be empty, got shape {pixels.shape}.")
        if palette is None:
            return
        if palette.ndim != 2 or palette.shape[1] != 3 or not 1 <= len(palette) <= 256:
            raise ValueError(f"`palette` must have shape (colours, 3) with 1 to 256 colours, got {palette.shape}.")
        if len(palette) < 256 and int(pixels.max()) >= len(palette):
            raise ValueError(f"`pixels` must point into {len(palette)} colours, got index {int(pixels.max())}.")

    @property
    def height(self) -> int:
        """Height in pixels."""
        return int(self.pixels.shape[0])

    @property
    def width(self) -> int:
        """Width in pixels."""
        return int(self.pixels.shape[1])

    def rgb(self) -> NDArray[np.uint8]:
        """Return the colours, ``(height, width, 3)``."""
        return self.pixels if self.palette is None else self.palette[self.pixels]

    def png(self) -> bytes:
        """Return the picture as a PNG file."""
        return encode(self.pixels, self.palette)
