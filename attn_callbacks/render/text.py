"""Text as pixels: glyphs by Pillow, everything else here."""

from __future__ import annotations

import unicodedata
from functools import lru_cache
from math import ceil

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

__all__ = ["clipped", "line_height", "printable", "rasterise", "short_number", "text_width"]

ELLIPSIS = "…"
# how tokenizers write a space or a line end, then characters that fold to two
_REPLACED = {"Ġ": "·", "▁": "·", "Ċ": "\\n", "ß": "ss", "æ": "ae", "œ": "oe", "ø": "o", "ł": "l", "đ": "d", "€": "EUR"}
_REPLACED |= {"\u2212": "-", "\u2013": "-", "\u2014": "-", "\u00d7": "x", "\u2192": "->"}
_FINER = 4  # glyphs are drawn this much larger and shrunk: even spacing, no hinting to whole pixels
_MISSING = "\uffff"  # drawn as a crossed box, as every character that the font lacks


def printable(text: str) -> str:
    r"""Return ``text`` in characters that the font can show, on one line.

    Accents fold away, a tokenizer's mark for a space becomes a dot, control characters their escapes, and what the font
    lacks altogether a crossed box.

    Example:
        >>> printable("Ġcafé\n")
        '·cafe\\n'
    """
    return "".join(_shown(character) for character in text)


def clipped(text: str, size: int, width: int) -> str:
    """Return the longest beginning of ``text`` that fits into ``width`` pixels, with an ellipsis where it was cut.

    Example:
        >>> clipped("transformer", 11, 40)
        'transf…'
    """
    text = printable(text)
    if text_width(text, size) <= width:
        return text
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if text_width(text[:middle] + ELLIPSIS, size) <= width else (low, middle - 1)
    return text[:low] + ELLIPSIS if low else ""


def text_width(text: str, size: int) -> int:
    """Return the width of ``text`` in pixels."""
    return int(rasterise(text, size).shape[1])


def line_height(size: int) -> int:
    """Return the height of every line of this font size in pixels."""
    return int(rasterise("", size).shape[0])


@lru_cache(maxsize=4096)
def rasterise(text: str, size: int) -> NDArray[np.uint8]:
    """Draw one line of text.

    Shape:
        - output: ``(height, width)``, ink from 0 to 255; read-only, since it is kept for the next caller
    """
    font, text = _font(size * _FINER), printable(text)
    finer = _FINER if isinstance(font, ImageFont.FreeTypeFont) else 1
    _, top, _, bottom = font.getbbox("Agjp|")
    height, width = ceil((bottom - top) / finer), ceil(font.getlength(text) / finer)
    image = Image.new("L", (max(1, width) * finer, height * finer))
    if text:
        ImageDraw.Draw(image).text((0, -top), text, fill=255, font=font)
    ink = np.array(image.resize((max(1, width), height), Image.Resampling.LANCZOS), dtype=np.uint8)[:, :width]
    ink.setflags(write=False)
    return ink


def short_number(value: float) -> str:
    """Return a number in at most five characters or so.

    Example:
        >>> [short_number(value) for value in (0.0, 0.0421, 3.14159, 15234, 2e-7)]
        ['0', '0.042', '3.14', '15.2k', '2e-07']
    """
    size = abs(value)
    if value == 0 or not np.isfinite(value):
        return "0" if value == 0 else str(value)
    if size < 1e-3:
        return f"{value:.0e}"
    for limit, unit, name in ((1e3, 1.0, ""), (1e6, 1e3, "k"), (1e9, 1e6, "M"), (1e12, 1e9, "G")):
        if size < limit:
            return _trimmed(f"{value / unit:.{3 if size < 1 else 2 if size / unit < 10 else 1}f}") + name
    return f"{value:.0e}"


def _trimmed(number: str) -> str:
    return number.rstrip("0").rstrip(".")


@lru_cache(maxsize=4096)
def _shown(character: str) -> str:
    if character == _MISSING:
        return _MISSING if isinstance(_font(12), ImageFont.FreeTypeFont) else "?"
    if character in _REPLACED:
        return _REPLACED[character]
    if unicodedata.category(character).startswith(("C", "Z")) and character != " ":
        known = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
        return known.get(character, " " if character.isspace() else "")
    if _has(character):
        return character
    folded = "".join(part for part in unicodedata.normalize("NFKD", character) if not unicodedata.combining(part))
    return folded if folded != character and all(map(_has, folded)) else _shown(_MISSING)


def _has(character: str) -> bool:
    if isinstance(_font(12), ImageFont.FreeTypeFont):
        return bytes(_font(12).getmask(character)) != bytes(_font(12).getmask(_MISSING))
    return character.isascii()


@lru_cache(maxsize=32)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    try:
        return ImageFont.load_default(size)
    except (ImportError, TypeError):  # Pillow before 10.1 or without FreeType has one bitmap font
        return ImageFont.load_default()
