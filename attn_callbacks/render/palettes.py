"""Colours that keep their order and their differences for colour-blind readers and in grey print.

All are built in Oklab, where equal distances look equal: a path through control points is cut into equal steps.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

__all__ = ["diverging", "head_colours", "luminance", "seen_with", "sequential"]

Colours = NDArray[np.uint8]
Reals = NDArray[np.float64]

# Control points as (lightness, chroma, hue in degrees)
_NIGHT_TO_SUN = ((0.17, 0.060, 292), (0.34, 0.125, 280), (0.50, 0.105, 240), (0.64, 0.100, 196), (0.78, 0.140, 155),
                 (0.90, 0.165, 112), (0.97, 0.110, 104))  # fmt: skip
_BLUE_TO_RUST = ((0.33, 0.110, 255), (0.60, 0.115, 248), (0.97, 0.004, 90), (0.68, 0.120, 52), (0.38, 0.110, 38))

# Okabe and Ito, "Color Universal Design", 2008, without black
_OKABE_ITO = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
    (240, 228, 66),
)

# Viénot, Brettel and Mollon, Color Research and Application 24, 1999: linear RGB as dichromats see it
_SEEN = {
    "protan": ((0.11238, 0.88762, 0.0), (0.11238, 0.88762, 0.0), (0.00401, -0.00401, 1.0)),
    "deutan": ((0.29275, 0.70725, 0.0), (0.29275, 0.70725, 0.0), (-0.02234, 0.02234, 1.0)),
}

_TO_CONES = np.array([[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
                      [0.0883024619, 0.2817188376, 0.6299787005]])  # fmt: skip
_TO_OKLAB = np.array([[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
                      [0.0259040371, 0.7827717662, -0.8086757660]])  # fmt: skip


def sequential(count: int = 256) -> Colours:
    """Return colours from night blue over green to sun yellow, darker is less.

    Lightness grows in every step, and equal steps look equal.

    Shape:
        - output: ``(count, 3)``; ``uint8``

    Example:
        >>> sequential(3).tolist()[0] < sequential(3).tolist()[-1]
        True
    """
    return _path(_NIGHT_TO_SUN, count)


def diverging(count: int = 255) -> Colours:
    """Return colours from blue over near white to rust; an odd ``count`` has its middle at near white.

    Shape:
        - output: ``(count, 3)``; ``uint8``

    Example:
        >>> bool(diverging(5)[2].min() > 235)
        True
    """
    half = count // 2 + 1
    left, right = _path(_BLUE_TO_RUST[:3], half), _path(_BLUE_TO_RUST[2:], half)
    return np.concatenate([left[: count // 2], right[1 - count % 2 :]])


def head_colours(count: int) -> Colours:
    """Return one colour a head, as different as can be for readers with and without colour blindness.

    Begins with the palette of Okabe and Ito; every further colour is the one farthest from all before it. A head keeps
    its colour whatever ``count`` is. From 64 heads on, colours repeat.

    Shape:
        - output: ``(count, 3)``; ``uint8``

    Example:
        >>> head_colours(2).tolist()
        [[230, 159, 0], [86, 180, 233]]
    """
    return _spread()[np.arange(count) % len(_spread())]


def luminance(colours: Colours) -> Reals:
    """Return the relative luminance of each colour, 0 for black to 1 for white.

    Shape:
        - colours: ``(..., 3)``
        - output: ``(...)``
    """
    return np.asarray(_linear(colours) @ np.array([0.2126, 0.7152, 0.0722]))


def seen_with(kind: str, colours: Colours) -> Colours:
    """Return the colours as a reader with ``"protan"`` or ``"deutan"`` vision sees them.

    Shape:
        - colours, output: ``(..., 3)``; ``uint8``
    """
    return _encoded(_linear(colours) @ np.array(_SEEN[kind]).T)


def _path(points: tuple[tuple[float, float, float], ...], count: int) -> Colours:
    lightness, chroma, hue = np.array(points, dtype=np.float64).T
    corners = np.stack([lightness, chroma * np.cos(np.radians(hue)), chroma * np.sin(np.radians(hue))], axis=1)
    fine = np.stack([_smooth(corners[:, axis]) for axis in range(3)], axis=1)
    travelled = np.concatenate([[0.0], np.linalg.norm(np.diff(fine, axis=0), axis=1).cumsum()])
    stops = np.linspace(0.0, travelled[-1], count)
    even = np.stack([np.interp(stops, travelled, fine[:, axis]) for axis in range(3)], axis=1)
    return _from_oklab(even)


def _smooth(values: Reals, steps: int = 64) -> Reals:
    """Draw a curve through ``values`` without overshooting: cubic Hermite with limited slopes."""
    rise = np.diff(values)
    slope = np.zeros_like(values)
    same = rise[:-1] * rise[1:] > 0
    slope[1:-1][same] = 2 * rise[:-1][same] * rise[1:][same] / (rise[:-1] + rise[1:])[same]
    slope[[0, -1]] = rise[[0, -1]]
    at = np.linspace(0, 1, steps, endpoint=False)[None]
    start, end = values[:-1, None], values[1:, None]
    bend = at * (1 - at) ** 2 * slope[:-1, None] - at**2 * (1 - at) * slope[1:, None]
    return np.append((start + (end - start) * at**2 * (3 - 2 * at) + bend).ravel(), values[-1])


@lru_cache(maxsize=1)
def _spread(count: int = 64) -> Colours:
    """Grow the palette of Okabe and Ito by farthest-point search over colours that show on white."""
    lightness, chroma, hue = np.meshgrid(np.linspace(0.36, 0.82, 6), [0.06, 0.12, 0.17], np.arange(0, 360, 12))
    radians = np.radians(hue.ravel())
    lab = np.stack([lightness.ravel(), chroma.ravel() * np.cos(radians), chroma.ravel() * np.sin(radians)], axis=1)
    choices = np.concatenate([np.array(_OKABE_ITO, np.uint8), _from_oklab(lab)])
    views = [_to_oklab(view) for view in (choices, seen_with("protan", choices), seen_with("deutan", choices))]
    nearest = np.full(len(choices), np.inf)
    picked: list[int] = []
    for turn in range(count):
        picked.append(turn if turn < len(_OKABE_ITO) else int(nearest.argmax()))
        gaps = [np.linalg.norm(view - view[picked[-1]], axis=1) for view in views]
        nearest = np.minimum(nearest, gaps[0] * 0.2 + np.minimum(gaps[1], gaps[2]) * 0.8)
    return choices[picked]


def _linear(colours: Colours) -> Reals:
    scaled = np.asarray(colours, dtype=np.float64) / 255
    return np.where(scaled <= 0.04045, scaled / 12.92, ((scaled + 0.055) / 1.055) ** 2.4)


def _encoded(linear: Reals) -> Colours:
    inside = linear.clip(0, 1)
    scaled = np.where(inside <= 0.0031308, inside * 12.92, 1.055 * inside ** (1 / 2.4) - 0.055)
    return (scaled * 255).round().astype(np.uint8)


def _to_oklab(colours: Colours) -> Reals:
    return np.asarray(np.cbrt(_linear(colours) @ _TO_CONES.T) @ _TO_OKLAB.T)


def _from_oklab(lab: Reals) -> Colours:
    return _encoded((lab @ np.linalg.inv(_TO_OKLAB).T) ** 3 @ np.linalg.inv(_TO_CONES).T)
