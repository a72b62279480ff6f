"""Pictures of roles: each in its colour, pale where unsure, with a legend of those that occur."""

from __future__ import annotations

import numpy as np
import pytest

from attn_callbacks.functional.role_labels import ROLE_LABELS
from attn_callbacks.render import head_colours
from attn_callbacks.render.layers import short_layer_names
from attn_callbacks.render.layout import MAX_WIDTH
from attn_callbacks.render.roles import (
    ABBREVIATIONS,
    NOTHING,
    SWATCH,
    role_colours,
    role_grid,
    role_timeline,
)
from attn_callbacks.render.text import text_width

SINK, PREVIOUS, NEXT = (ROLE_LABELS.index(name) for name in ("sink", "previous", "next"))
NAMES = ("sink", "previous", "next")


def holds(pixels: np.ndarray, colour: object) -> np.ndarray:
    return (pixels == np.asarray(colour, np.uint8)).all(axis=-1)


def test_a_role_has_one_colour_everywhere() -> None:
    labels = np.arange(-1, len(ROLE_LABELS))
    found = role_colours(labels, ROLE_LABELS)
    assert len({tuple(colour) for colour in found[1:].tolist()}) == len(ROLE_LABELS)
    np.testing.assert_array_equal(found[1:-1], head_colours(len(ROLE_LABELS) - 1))
    assert tuple(found[0]) == tuple(found[-1]) == NOTHING
    np.testing.assert_array_equal(role_colours(labels[None], ROLE_LABELS)[0], found)


def test_every_abbreviation_fits_its_cell() -> None:
    assert set(ABBREVIATIONS) <= set(ROLE_LABELS)
    shown = [ABBREVIATIONS.get(name, name[:4]) for name in ROLE_LABELS]
    assert len(set(shown)) == len(ROLE_LABELS)
    assert max(text_width(name, 12) for name in shown) <= 38


def test_cells_and_legend_have_the_colours_of_roles() -> None:
    pixels = role_grid(np.array([[0, 1, 0], [2, -1, 0]]), NAMES, title="roles").rgb()
    for number, count in ((0, 3), (1, 1), (2, 1)):
        places = np.argwhere(holds(pixels, head_colours(3)[number]))
        legend = SWATCH * SWATCH
        area = len(places) - legend
        assert 0.6 * count * 19 * 43 < area <= count * 20 * 44  # less the lines between cells and what is written
    columns = [np.argwhere(holds(pixels, head_colours(3)[number]))[:, 1].max() for number in (0, 1)]
    assert columns[0] > columns[1]


def test_the_legend_names_only_what_occurs() -> None:
    pixels = role_grid(np.zeros((2, 2), int), NAMES).rgb()
    assert not holds(pixels, head_colours(3)[1]).any()


def test_unsure_labels_are_pale() -> None:
    labels = np.array([[0, 0, 0, 0]])
    colour = head_colours(3)[0]
    pale = (colour.astype(int) + 510) // 3
    sure = role_grid(labels, NAMES, sure=np.ones((1, 4), bool)).rgb()
    mixed = role_grid(labels, NAMES, sure=np.array([[True, False, False, True]])).rgb()
    assert not holds(sure, pale).any()
    ratio = holds(mixed, pale).sum() / (holds(mixed, colour).sum() - SWATCH * SWATCH)
    assert ratio == pytest.approx(1.0, abs=0.1)
    pixels = role_timeline(labels, NAMES, heads=["a"], epochs=range(4), sure=np.array([[True, False, False, True]]))
    assert holds(pixels.rgb(), pale).any()


def test_strength_stands_below_the_role() -> None:
    labels = np.array([[0, 1]])
    plain = role_grid(labels, NAMES)
    told = role_grid(labels, NAMES, strength=np.array([[0.25, np.nan]]))
    assert told.height == plain.height + 14
    other = role_grid(labels, NAMES, strength=np.array([[0.75, np.nan]]))
    assert (told.rgb() != other.rgb()).any()


def test_epochs_go_from_left_to_right_and_the_latest_are_kept() -> None:
    changes = np.array([[0] * 5 + [1] * 5])
    pixels = role_timeline(changes, NAMES, heads=["layer 0 head 3"], epochs=range(10)).rgb()[60:]
    places = [np.argwhere(holds(pixels, head_colours(3)[number]))[:, 1] for number in (0, 1)]
    assert places[0].max() < places[1].min()
    labels = np.zeros((1, 2000), int)
    labels[:, -1] = 1
    picture = role_timeline(labels, NAMES, heads=["a head"], epochs=range(2000))
    assert picture.width <= MAX_WIDTH
    assert holds(picture.rgb()[60:], head_colours(3)[1]).any()


def test_more_heads_than_fit_are_counted() -> None:
    few, many = (role_timeline(np.zeros((n, 2), int), NAMES, heads=["x"] * n, epochs=[0, 1]) for n in (100, 300))
    assert many.height == few.height
    assert (many.rgb()[:60, :300] != few.rgb()[:60, :300]).any()


def test_what_layers_share_is_left_out() -> None:
    assert short_layer_names(["a.b.0.c", "a.b.1.c"]) == ["layer 0", "layer 1"]
    assert short_layer_names(["net"]) == ["net"]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="`labels` must have 2 axes"):
        role_grid(np.array([0, 1]), NAMES)
    with pytest.raises(ValueError, match="index into 3 `names`, or -1"):
        role_grid(np.array([[3]]), NAMES)
    with pytest.raises(ValueError, match="index into 3 `names`, or -1"):
        role_grid(np.zeros((0, 2), int), NAMES)
    with pytest.raises(ValueError, match=r"`layer_labels` must hold one entry per row of `labels` \(1\), got 2"):
        role_grid(np.array([[0]]), NAMES, layer_labels=["a", "b"])
    with pytest.raises(ValueError, match=r"`epochs` must hold one entry per column \(2\), got 1"):
        role_timeline(np.array([[0, 1]]), NAMES, heads=["a"], epochs=[0])


@pytest.mark.parametrize("shape", [(96, 128), (1, 400), (300, 2)])
def test_many_layers_and_heads_stay_on_a_page(shape):
    labels = np.zeros(shape, np.int64)
    names = [f"model.decoder.layers.{layer}.self_attn" for layer in range(shape[0])]
    picture = role_grid(labels, ROLE_LABELS, strength=np.ones(shape), layer_labels=names)
    assert picture.width <= 1700
    assert picture.height <= 2500
