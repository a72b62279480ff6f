"""Heat maps of heads: every weight in its place and colour, frames, labels, and sizes from one to thousands."""

from __future__ import annotations

import time

import numpy as np
import pytest

from attn_callbacks.render import attention_heads, head_colours, sequential
from attn_callbacks.render.canvas import RAMP, header_height
from attn_callbacks.render.layout import FRAME, arrange
from tests.render.decoding import attention, decoded, has

WORDS = ["[CLS]", "the", "film", "is", "long", "but", "moving", "[SEP]"]


def cells(picture, layout, head):
    """Return one pixel of every cell of a head, ``(queries, keys, 3)``."""
    top, left = (corner + FRAME + layout.cell // 2 for corner in layout.corner(head))
    down, across = np.arange(layout.queries) * layout.cell, np.arange(layout.keys) * layout.cell
    return decoded(picture)[top + down[:, None], left + across]


def test_every_weight_has_its_place_and_colour():
    maps = attention(5, 6, 9)
    picture = attention_heads(maps, title="layer")
    layout = arrange(5, 6, 9, header=header_height("layer"))
    palette = sequential(256 - RAMP - 5)
    for head in range(5):
        expected = palette[np.rint(np.sqrt(maps[head] / maps.max()) * (len(palette) - 1)).astype(int)]
        assert np.abs(cells(picture, layout, head).astype(int) - expected).max() <= 4  # one step of the palette


def test_darker_is_less():
    maps = np.linspace(0, 1, 16).reshape(1, 4, 4)
    shown = cells(attention_heads(maps), arrange(1, 4, 4, header=header_height("")), 0).reshape(16, 3)
    assert (np.diff(shown @ np.array([0.2126, 0.7152, 0.0722])) > 0).all()


def test_every_head_is_framed_in_its_own_colour():
    picture, layout = attention_heads(attention(12, 7, 7)), arrange(12, 7, 7, header=header_height(""))
    for head, colour in enumerate(head_colours(12)):
        top, left = layout.corner(head)
        frame = decoded(picture)[top : top + layout.panel_height, left : left + layout.panel_width]
        for edge in (frame[:3], frame[-3:], frame[:, :3], frame[:, -3:]):
            assert (edge == colour).all()


def test_given_colours_are_taken():
    picture = attention_heads(attention(2, 3, 3), colours=np.array([[1, 2, 3], [250, 0, 9]], np.uint8))
    assert has(picture, (1, 2, 3))
    assert has(picture, (250, 0, 9))
    assert not has(picture, head_colours(1)[0])


def test_labels_change_only_the_room_beside_the_maps():
    maps = attention(4, 8, 8)
    one = attention_heads(maps, row_labels=WORDS, column_labels=WORDS)
    other = attention_heads(maps, row_labels=[*WORDS[:-1], "[PAD]"], column_labels=WORDS)
    changed = np.argwhere((decoded(one) != decoded(other)).any(axis=-1))
    top, _ = arrange(4, 8, 8, header=header_height("")).corner(0)
    label_width = changed[:, 1].max()
    assert len(changed) > 0
    assert label_width < 12 + 60  # in the margin, left of the first column of panels
    assert changed[:, 0].min() > top + 7 * 24  # beside the last row of the panels


def test_query_labels_end_at_the_maps():
    labels = ["H", *["HHHHHHH"] * 7]
    top, _ = arrange(1, 8, 8, labels=(1, 0), header=header_height("")).corner(0)
    beside = decoded(attention_heads(attention(1, 8, 8), row_labels=labels))[top : top + 24, :70]
    ink = np.argwhere((beside < 128).all(axis=-1))[:, 1]
    assert ink.min() > 40  # the short label stands at the right end of the room for the long ones


@pytest.mark.parametrize("which", ["row_labels", "column_labels", "titles", "title"])
def test_text_appears(which):
    maps = attention(1, 8, 8)
    texts = {"row_labels": WORDS, "column_labels": WORDS, "titles": ["induction"], "title": "layer 3"}
    bare, labelled = attention_heads(maps, titles=[""]), attention_heads(maps, **{"titles": [""], which: texts[which]})
    dark = [(decoded(picture).max(axis=-1) < 60).sum() for picture in (bare, labelled)]
    assert dark[1] > dark[0] + 20


def test_labels_that_do_not_fit_are_left_out():
    maps = attention(12, 100, 100)
    labels = [f"token {index}" for index in range(100)]
    bare, labelled = attention_heads(maps), attention_heads(maps, row_labels=labels, column_labels=labels)
    np.testing.assert_array_equal(decoded(bare), decoded(labelled))


@pytest.mark.parametrize("labels", [[""] * 8, ["Ġwörd", "你好", "🙂", "\n", "\x00", "a" * 300, " ", "é"]])
def test_strange_labels(labels):
    picture = attention_heads(attention(2, 8, 8), row_labels=labels, column_labels=labels, title=labels[5])
    assert picture.width <= 1600
    assert decoded(picture).shape == (picture.height, picture.width, 3)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 1, 40), (1, 40, 1), (12, 24, 24), (8, 5, 30), (64, 20, 20), (3, 197, 197), (2, 12, 2000)]
)
def test_sizes(shape):
    picture = attention_heads(attention(*shape), title="layer")
    assert 60 <= picture.height <= 2200
    assert 300 <= picture.width <= 1600
    np.testing.assert_array_equal(decoded(picture), picture.rgb())


def test_long_sequences_are_pooled_and_say_so():
    maps = np.zeros((2, 2000, 2000), np.float32)
    maps[:, np.arange(2000), np.arange(2000)] = 1
    picture = attention_heads(maps, title="long")
    layout = arrange(2, 2000, 2000, header=header_height("long"))
    assert picture.width <= 1600
    assert layout.queries == layout.keys < 800
    shown = cells(picture, layout, 0)
    bright = (shown == sequential(256 - RAMP - 2)[-1]).all(axis=-1)
    assert bright.diagonal().all()  # pooled rows still sum to one: the diagonal stays at the top of the scale
    assert bright.sum() == layout.queries


def test_many_heads_stay_on_the_page():
    picture = attention_heads(attention(300, 8, 8))
    assert picture.width <= 1600


def test_not_a_number_is_drawn_as_zero():
    maps = attention(1, 4, 4)
    holes, zeros = maps.copy(), maps.copy()
    holes[0, 1], zeros[0, 1] = np.nan, 0.0
    np.testing.assert_array_equal(decoded(attention_heads(holes)), decoded(attention_heads(zeros)))
    assert decoded(attention_heads(np.zeros((1, 2, 2)))).any()


def test_a_given_scale_makes_pictures_comparable():
    weak, strong = np.full((1, 3, 3), 0.25), np.full((1, 3, 3), 1.0)
    layout = arrange(1, 3, 3, header=header_height(""))
    shown = [cells(attention_heads(maps, high=1.0), layout, 0)[0, 0] for maps in (weak, strong)]
    palette = sequential(256 - RAMP - 1)
    assert shown[1].tolist() == palette[-1].tolist()
    assert np.abs(shown[0].astype(int) - palette[len(palette) // 2]).max() <= 4  # the square root of a quarter


def test_a_given_cell_size():
    small, large = (attention_heads(attention(1, 40, 40), cell=cell) for cell in (4, 12))
    assert large.height - small.height == 8 * 40


def test_144_maps_in_time():
    maps = attention(144, 64, 64).astype(np.float32)
    attention_heads(maps)  # glyphs and colours are kept after the first time
    times = []
    for _ in range(5):
        start = time.process_time()
        size = len(attention_heads(maps, title="all").png())
        times.append(time.process_time() - start)
    assert min(times) < 0.08
    assert size < 600_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"maps": np.ones((3, 3))}, r"`maps` must have 3 axes, got shape \(3, 3\)"),
        ({"maps": np.ones((0, 3, 3))}, r"`maps` must hold at least one weight, got shape \(0, 3, 3\)"),
        ({"row_labels": ["a"]}, r"`row_labels` must hold one entry per query \(3\), got 1"),
        ({"column_labels": ["a"]}, r"`column_labels` must hold one entry per key \(4\), got 1"),
        ({"titles": ["a"]}, r"`titles` must hold one entry per head \(2\), got 1"),
        ({"colours": np.zeros((3, 3), np.uint8)}, r"`colours` must hold one entry per head \(2\), got 3"),
        ({"cell": 0}, "`cell` must be at least 1, got 0"),
    ],
)
def test_checks(arguments, message):
    with pytest.raises(ValueError, match=message):
        attention_heads(**{"maps": np.ones((2, 3, 4)) / 4, **arguments})
