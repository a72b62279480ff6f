"""Pictures of alignments read back: colours of weights, frames, corners, dots and labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from attn_callbacks.render.alignment import GOLD, alignment_picture
from attn_callbacks.render.canvas import INK, MARGIN, PAGE, SMALL, header_height
from attn_callbacks.render.palettes import sequential
from attn_callbacks.render.text import text_width
from tests.render.decoding import decoded

TARGET, SOURCE, SIDE = ["das", "alte", "Haus"], ["the", "old", "house", "."], 24
WEIGHTS = np.array([[1.0, 0, 0, 0], [0, 0.25, 0.75, 0], [0, 0, np.nan, 0.5]])


def cells(title: str = "", **marks: Any) -> np.ndarray:
    """The cells ``(rows, columns, side, side, 3)`` of the picture."""
    pixels = decoded(alignment_picture(WEIGHTS, SOURCE, TARGET, title=title, **marks))
    left = MARGIN + max(text_width(word, SMALL) for word in TARGET) + 8
    block = pixels[header_height(title) :, left:][: 3 * SIDE, : 4 * SIDE]
    return block.reshape(3, SIDE, 4, SIDE, 3).swapaxes(1, 2)


def marked(*places: tuple[int, int]) -> np.ndarray:
    found = np.zeros(WEIGHTS.shape, bool)
    for place in places:
        found[place] = True
    return found


@pytest.mark.parametrize("title", ["", "head 0"])
def test_colours_follow_the_square_root(title: str) -> None:
    found = cells(title)[:, :, SIDE // 2, SIDE // 2]
    for (row, column), weight in np.ndenumerate(np.nan_to_num(WEIGHTS)):
        assert (found[row, column] == sequential()[round(255 * weight**0.5)]).all()


def test_sure_links_get_a_frame_and_possible_ones_its_corners() -> None:
    found = (cells(sure=marked((0, 0)), possible=marked((0, 0), (1, 1))) == GOLD).all(axis=-1)
    frame, corners = found[0, 0][:-1, :-1], found[1, 1][:-1, :-1]  # the last line parts the cells
    assert frame[:2].all()
    assert frame[:, -2:].all()
    assert not frame[2:-2, 2:-2].any()
    assert corners[0, 0]
    assert corners[-1, -1]
    assert not corners[len(corners) // 2].any()
    assert 0 < corners.sum() < frame.sum()
    assert found[0, 0].any()
    assert not found[2].any()


def test_dots_show_on_dark_and_bright_cells() -> None:
    plain, dotted = cells(), cells(links=marked((0, 0), (2, 0)))
    changed = (plain != dotted).any(axis=-1)
    assert changed[0, 0].any()
    assert (dotted[0, 0][changed[0, 0]] == INK).all()
    assert (dotted[2, 0][changed[2, 0]] == PAGE).all()
    assert changed.any(axis=(2, 3)).sum() == 2


def test_every_token_is_written() -> None:
    empty = alignment_picture(WEIGHTS, [""] * 4, [""] * 3)
    for words in ((SOURCE, [""] * 3), ([""] * 4, TARGET)):
        named = alignment_picture(WEIGHTS, *words)
        assert named.pixels.shape[0] > empty.pixels.shape[0] or words[0] != SOURCE
        assert (named.pixels == INK).all(axis=-1).sum() > (empty.pixels == INK).all(axis=-1).sum()


def test_long_sentences_stay_on_the_page() -> None:
    picture = alignment_picture(np.full((90, 100), 0.01), ["word"] * 100, ["a very long token indeed"] * 90)
    assert picture.width < 1700
    assert picture.height < 1600


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"`target_tokens` must hold one entry per row \(3\), got 4"):
        alignment_picture(WEIGHTS, SOURCE, SOURCE)
    with pytest.raises(ValueError, match=r"`source_tokens` must hold one entry per column \(4\), got 3"):
        alignment_picture(WEIGHTS, TARGET, TARGET)
    with pytest.raises(ValueError, match=r"`sure` must have the shape of `weights` \(3, 4\), got \(4, 3\)"):
        alignment_picture(WEIGHTS, SOURCE, TARGET, sure=marked().T)
    with pytest.raises(ValueError, match="`weights` must have 2 axes"):
        alignment_picture(WEIGHTS[None], SOURCE, TARGET)
    with pytest.raises(ValueError, match="`weights` must hold at least one weight"):
        alignment_picture(np.zeros((0, 2)), [], [])
