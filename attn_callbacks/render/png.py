"""PNG files in as few milliseconds as zlib allows: level 1, one cheap filter, a palette where the picture has one."""

from __future__ import annotations

import struct
import zlib

import numpy as np
from numpy.typing import NDArray

__all__ = ["encode"]

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_RGB, _PALETTE = 2, 3  # colour types
_UP = 2  # filter type: difference to the line above. Indices compress better without


def encode(pixels: NDArray[np.uint8], palette: NDArray[np.uint8] | None = None, level: int = 1) -> bytes:
    r"""Return a PNG file.

    Args:
        pixels: Colour indices where there is a palette, else colours.
        palette: Colours the indices point to.
        level: zlib level. Levels above 1 save a fifth of the bytes for two to ten times the time.

    Shape:
        - pixels: ``(height, width)`` with a palette, else ``(height, width, 3)``
        - palette: ``(colours, 3)``, at most 256

    Example:
        >>> encode(np.zeros((1, 1), np.uint8), np.zeros((1, 3), np.uint8))[:4]
        b'\x89PNG'
    """
    height, width = pixels.shape[:2]
    lines = np.zeros((height, 1 + pixels[0].size), np.uint8)  # each line starts with its filter type, 0: none
    lines[:, 1:] = pixels.reshape(height, -1)
    kind = _RGB if palette is None else _PALETTE
    if palette is None:
        lines[1:, 1:] -= pixels.reshape(height, -1)[:-1]
        lines[1:, 0] = _UP
    header = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    chunks = [_chunk(b"IHDR", header)]
    chunks += [] if palette is None else [_chunk(b"PLTE", palette.tobytes())]
    chunks += [_chunk(b"IDAT", zlib.compress(lines.tobytes(), level)), _chunk(b"IEND", b"")]
    return _SIGNATURE + b"".join(chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))
