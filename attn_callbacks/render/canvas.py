"""A canvas to draw boxes, text and scales on, in colours or in palette indices."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from attn_callbacks.render.palettes import luminance
from attn_callbacks.render.text import clipped, rasterise, short_number, text_width

__all__ = [
    "GREY",
    "INK",
    "MARGIN",
    "PAGE",
    "RAMP",
    "SMALL",
    "Canvas",
    "IndexCanvas",
    "hatched",
    "header_height",
    "header_width",
    "ink_on",
    "widest",
]

SMALL, HEADING = 12, 17  # font sizes in pixels
PAGE, INK, GREY, LINE = (255, 255, 255), (32, 33, 36), (112, 117, 122), (218, 220, 224)
MARGIN, BAR, BAR_ROOM, HEADING_ROOM = 12, 160, 42, 28
RAMP = 16  # steps between page and ink in an index canvas

Colour = tuple[int, int, int]


class Canvas:
    """White page in colours.

    Args:
        height: Height in pixels.
        width: Width in pixels.
    """

    def __init__(self, height: int, width: int) -> None:
        self.pixels: NDArray[np.uint8] = np.full((height, width, 3), 255, np.uint8)

    def text(
        self,
        top: int,
        left: int,
        text: str,
        size: int = SMALL,
        *,
        width: int | None = None,
        align: str = "left",
        colour: Colour = INK,
    ) -> None:
        """Write one line into a box of ``width``, cut with an ellipsis where it does not fit."""
        ink = self._ink(text, size, width)
        room = 0 if width is None else width - ink.shape[1]
        left += {"left": 0, "center": room // 2, "right": room}[align]
        self._draw(ink, top, left, colour)

    def header(self, title: str, caption: str, colours: NDArray[np.uint8], ends: tuple[float, ...]) -> None:
        """Write the heading of the picture and, below it, its colour bar and a grey caption."""
        width = self.pixels.shape[1] - 2 * MARGIN
        self.text(MARGIN - 3, MARGIN, title, HEADING, width=width)
        top = header_height(title) - BAR_ROOM
        self.scale(top, MARGIN, colours, ends)
        self.text(top - 2, MARGIN + BAR + 16, caption, width=width - BAR - 16, colour=GREY)

    def upright(self, top: int, left: int, text: str, size: int = SMALL, *, height: int | None = None) -> None:
        """Write one line from bottom to top, ending at ``top``."""
        self._draw(np.rot90(self._ink(text, size, height)), top, left, INK)

    def scale(self, top: int, left: int, colours: NDArray[np.uint8], ends: tuple[float, ...], width: int = BAR) -> None:
        """Draw a colour bar with numbers spread evenly below it; ``colours`` are what the pixels hold."""
        self.pixels[top : top + 10, left : left + width] = colours[np.arange(width) * len(colours) // width]
        for place, value in zip(np.linspace(0, width, len(ends)), ends, strict=True):
            align = "left" if place == 0 else "right" if place == width else "center"
            start = {"left": 0, "right": -60, "center": -30}[align]
            self.text(top + 13, left + int(place) + start, short_number(value), SMALL, width=60, align=align)

    @staticmethod
    def _ink(text: str, size: int, width: int | None) -> NDArray[np.uint8]:
        return rasterise(text if width is None else clipped(text, size, width), size)

    def _draw(self, ink: NDArray[np.uint8], top: int, left: int, colour: Colour) -> None:
        ink = ink[max(-top, 0) :, max(-left, 0) :]
        top, left = max(top, 0), max(left, 0)
        region = self.pixels[top : top + ink.shape[0], left : left + ink.shape[1]]
        self._blend(region, ink[: region.shape[0], : region.shape[1]], colour)

    def _blend(self, region: NDArray[np.uint8], ink: NDArray[np.uint8], colour: Colour) -> None:
        share = ink[..., None] / 255.0
        region[:] = (region * (1 - share) + np.array(colour) * share).round().astype(np.uint8)


class IndexCanvas(Canvas):
    """White page in palette indices, whose first ``RAMP`` colours lead from page to ink: a third of the bytes."""

    def __init__(self, height: int, width: int) -> None:
        self.pixels = np.zeros((height, width), np.uint8)

    @staticmethod
    def ramp() -> NDArray[np.uint8]:
        """Return the first colours of the palette, ``(RAMP, 3)``."""
        share = np.linspace(0, 1, RAMP)[:, None]
        return (np.array(PAGE) * (1 - share) + np.array(INK) * share).round().astype(np.uint8)

    def _blend(self, region: NDArray[np.uint8], ink: NDArray[np.uint8], colour: Colour) -> None:
        strongest = 1.0 if colour == INK else 0.65
        np.maximum(region, (ink * (strongest * (RAMP - 1) / 255.0)).round().astype(np.uint8), out=region)


def hatched(height: int, width: int) -> NDArray[np.uint8]:
    """Return the filling of a cell without a value, ``(height, width, 3)``."""
    stripes = (np.arange(height)[:, None] + np.arange(width)) % 6 < 2
    return np.where(stripes[..., None], np.array(LINE), np.array((244, 245, 246))).astype(np.uint8)


def ink_on(colour: NDArray[np.uint8]) -> Colour:
    """Return the text colour that reads best on ``colour``."""
    return INK if float(luminance(colour)) > 0.3 else PAGE


def widest(texts: list[str], size: int, limit: int) -> int:
    """Return the width that the longest of ``texts`` needs, at most ``limit``."""
    return min(limit, max((text_width(text, size) for text in texts), default=0))


def header_height(title: str) -> int:
    """Return the room that a header takes, less where it has no ``title``."""
    return MARGIN + BAR_ROOM + (HEADING_ROOM if title else 0)


def header_width(title: str, caption: str = "") -> int:
    """Return the width that shows all of a header, at most 1200."""
    return min(1200, max(text_width(title, HEADING), BAR + 16 + text_width(caption, SMALL))) + 2 * MARGIN
