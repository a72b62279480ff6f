"""Text as a page: escaped, whole, and in the colours of its values."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from attn_callbacks.render.palettes import diverging, luminance, sequential
from attn_callbacks.render.token_colours import token_html


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.words: list[tuple[str, str]] = []
        self._colour = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = re.search(r"background:(#\w+)", dict(attrs).get("style") or "")
        self._colour = found[1] if found and tag == "span" else ""

    def handle_data(self, data: str) -> None:
        if self._colour and data.strip("\n"):
            self.words.append((data, self._colour))

    def handle_endtag(self, tag: str) -> None:
        self._colour = ""


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    return reader


def test_markup_in_tokens_and_title_is_text() -> None:
    labels = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a & b", "{text}", "\x00\n"]
    page = token_html(np.linspace(0.0, 1.0, 5), labels, title="</title><script>")
    reader = read(page)
    assert set(reader.tags) == {"html", "head", "meta", "title", "body", "h1", "p", "span"}
    assert [word for word, _ in reader.words] == [*labels[:4], "  "]
    assert not re.search(r"https?:|src=\"|href|url\(", page)


def test_colours_follow_values() -> None:
    colours = [colour for _, colour in read(token_html(np.array([0.0, 0.25, 1.0]), ["a", "b", "c"])).words]
    palette = sequential()
    expected = ["#" + "".join(f"{part:02x}" for part in palette[place].tolist()) for place in (0, 128, 255)]
    assert colours == expected  # the square root of a quarter is a half
    assert luminance(palette[255]) > luminance(palette[0])
    signed = [colour for _, colour in read(token_html(np.array([-1.0, 0.0, 1.0]), ["a", "b", "c"])).words]
    ends = ["#" + "".join(f"{part:02x}" for part in diverging()[place].tolist()) for place in (0, 127, 254)]
    assert signed == ends


def test_nothing_to_tell_apart_and_refusals() -> None:
    assert "nan" not in token_html(np.array([np.nan, 0.0]), ["a", "b"])
    with pytest.raises(ValueError, match="`labels` must hold one text per value"):
        token_html(np.array([1.0]), ["a", "b"])
    with pytest.raises(ValueError, match="`values`"):
        token_html(np.ones((1, 2)), ["a", "b"])
