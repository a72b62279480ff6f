"""Text stays on one line, within its width, whatever characters come."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import ImageFont

from attn_callbacks.render import text
from attn_callbacks.render.text import clipped, line_height, printable, rasterise, short_number, text_width


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("plain", "plain"),
        ("Ġthe", "·the"),
        ("▁the", "·the"),
        ("a\nb\tc\x00", "a\\nb\\tc"),
        ("café naïve Ångström", "cafe naive Angstrom"),
        ("straße", "strasse"),
        ("你好", "\uffff\uffff"),
        ("no\u00a0break", "no break"),
        ("", ""),
    ],
)
def test_printable(given, shown):
    assert printable(given) == shown
    assert printable(shown) == shown
    assert clipped(given, 12, 1000) == shown


@pytest.mark.parametrize("given", ["word", "你好", "🙂", "\x07", "é", "|gjÅ", ""])
def test_every_line_has_the_same_height(given):
    ink = rasterise(given, 12)
    assert ink.dtype == np.uint8
    assert ink.shape[0] == line_height(12)
    assert ink.any() == (printable(given) != "")


def test_without_freetype_there_is_one_plain_font(monkeypatch):
    plain = ImageFont.load_default_imagefont()
    monkeypatch.setattr(text, "_font", lambda size: plain)
    kept = (text.rasterise, text._shown)
    for function in kept:
        function.cache_clear()
    try:
        assert printable("Ġcafé 你…") == "·cafe ?..."
        assert rasterise("Ġcafé 你…", 12).any()
    finally:
        for function in kept:
            function.cache_clear()


def test_kept_glyphs_cannot_be_spoiled():
    with pytest.raises(ValueError, match="read-only"):
        rasterise("word", 12)[:] = 0


@pytest.mark.parametrize("width", [0, 5, 20, 60, 500])
def test_clipped_text_fits(width):
    shown = clipped("a rather long label", 12, width)
    assert text_width(shown, 12) <= width
    assert shown == "a rather long label" if width == 500 else shown.endswith("…") or shown == ""


def test_numbers():
    given = [0.0, 1.0, 0.04211, 12.345, 999.94, 1234, 5.6e7, -0.5, 3e-9, float("nan")]
    assert [short_number(value) for value in given] == [
        "0", "1", "0.042", "12.3", "999.9", "1.23k", "56M", "-0.5", "3e-09", "nan",
    ]  # fmt: skip
