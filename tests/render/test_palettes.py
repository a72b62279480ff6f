"""Palettes keep their order in grey and for colour-blind readers; head colours stay apart."""

from __future__ import annotations

import numpy as np
import pytest

from attn_callbacks.render import diverging, head_colours, sequential
from attn_callbacks.render.palettes import luminance, seen_with

VISIONS = ("all", "protan", "deutan")


def seen(vision, colours):
    return colours if vision == "all" else seen_with(vision, colours)


@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize("count", [8, 64])
def test_sequential_grows_lighter_step_by_step(vision, count):
    lightness = luminance(seen(vision, sequential(count)))
    assert (np.diff(lightness) > 0).all()
    assert lightness[0] < 0.02
    assert lightness[-1] > 0.85


@pytest.mark.parametrize("count", [1, 2, 3, 176, 256])
def test_lengths(count):
    for palette in (sequential(count), diverging(count), head_colours(count)):
        assert palette.shape == (count, 3)
        assert palette.dtype == np.uint8


@pytest.mark.parametrize("vision", VISIONS)
def test_diverging_is_lightest_in_the_middle_and_its_ends_differ(vision):
    palette = seen(vision, diverging(31))
    lightness = luminance(palette)
    assert lightness.argmax() == 15
    assert (np.diff(lightness[:16]) > 0).all()
    assert (np.diff(lightness[15:]) < 0).all()
    ends = np.abs(palette[:8].astype(int) - palette[:-9:-1].astype(int)).sum(axis=1)
    assert ends.min() > 90


@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize(("heads", "apart"), [(12, 20), (24, 8)])
def test_head_colours_stay_apart(vision, heads, apart):
    colours = seen(vision, head_colours(heads)).astype(float)
    distance = np.linalg.norm(colours[:, None] - colours[None], axis=-1) + 1e9 * np.eye(heads)
    assert distance.min() > apart


def test_a_head_keeps_its_colour_and_colours_are_all_different():
    np.testing.assert_array_equal(head_colours(64)[:12], head_colours(12))
    assert len(np.unique(head_colours(64), axis=0)) == 64
    np.testing.assert_array_equal(head_colours(70)[64:], head_colours(6))
    assert head_colours(1).tolist() == [[230, 159, 0]]  # the first of Okabe and Ito
