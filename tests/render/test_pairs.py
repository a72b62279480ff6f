"""Matrices of pairs: colours at their places, lines between parts, names where there is room."""

from __future__ import annotations

import numpy as np
import pytest

from attn_callbacks.render.canvas import INK
from attn_callbacks.render.pairs import pair_matrix
from attn_callbacks.render.palettes import diverging, head_colours, sequential


def near(pixels: np.ndarray, colour: np.ndarray) -> np.ndarray:
    return (np.abs(pixels.astype(int) - np.asarray(colour).astype(int)).max(axis=-1) == 0).nonzero()


def values(heads: int, seed: int = 0) -> np.ndarray:
    found = np.random.default_rng(seed).normal(size=(heads, heads))
    return found + found.T


def test_every_pair_has_the_colour_of_its_value() -> None:
    matrix = np.array([[np.nan, 1.0], [-0.5, np.nan]])
    pixels = pair_matrix(matrix, diverging=True).rgb()
    palette = diverging()
    rows, columns = near(pixels, palette[-1])  # the largest: first row, second column
    low_rows, low_columns = near(pixels, palette[round(0.25 * 254)])
    body = slice(60, None)
    assert rows[rows > 60].size > 500
    assert rows[rows > 60].mean() < low_rows[low_rows > 60].mean()
    assert columns[rows > 60].mean() > low_columns[low_rows > 60].mean()
    assert pixels[body].shape[1] >= 2 * 48


def test_it_need_not_be_symmetric_and_ends_can_be_given() -> None:
    matrix = np.array([[0.0, 1.0], [0.25, 0.0]])
    pixels = pair_matrix(matrix, low=0.0, high=2.0).rgb()
    palette = sequential()
    for share in (0.5, 0.125):
        rows, _ = near(pixels, palette[round(share * 255)])
        assert rows[rows > 60].size > 500


def test_lines_part_the_layers() -> None:
    pixels = pair_matrix(np.zeros((144, 144)), parts=[12] * 12, low=-1.0, high=1.0, diverging=True).rgb()
    rows, columns = near(pixels, np.array(INK))
    across = [row for row, count in zip(*np.unique(rows, return_counts=True), strict=True) if count >= 144 * 6]
    down = [column for column, count in zip(*np.unique(columns, return_counts=True), strict=True) if count >= 144 * 6]
    assert len(across) == len(down) == 11
    assert set(np.diff(across)) == set(np.diff(down)) == {72}


def test_parts_of_other_sizes() -> None:
    pixels = pair_matrix(np.zeros((6, 6)), parts=[1, 2, 3], part_labels=["a", "b", "c"], low=0, high=1).rgb()
    rows, _ = near(pixels, np.array(INK))
    lines = [row for row, count in zip(*np.unique(rows, return_counts=True), strict=True) if count >= 6 * 48]
    assert np.diff(lines).tolist() == [2 * 48]


def test_colours_stand_beside_both_axes() -> None:
    colours = head_colours(5)
    pixels = pair_matrix(np.zeros((5, 5)), colours=colours).rgb()
    for colour in colours:
        rows, columns = near(pixels, colour)
        assert rows.size >= 2 * 48 * 10
        assert np.ptp(rows) > 48
        assert np.ptp(columns) > 40


def test_names_widen_the_picture() -> None:
    plain = pair_matrix(values(8)).rgb().shape
    named = pair_matrix(values(8), labels=[f"encoder {n}" for n in range(8)], parts=[4, 4], part_labels=["up", "down"])
    assert named.rgb().shape[0] > plain[0]
    assert named.rgb().shape[1] > plain[1]


@pytest.mark.parametrize("heads", [1, 2, 12, 144, 500])
def test_many_and_few(heads: int) -> None:
    pixels = pair_matrix(values(heads), title="interaction").rgb()
    assert max(pixels.shape) < 1200
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > min(heads, 20)


def test_without_any_value() -> None:
    assert pair_matrix(np.full((3, 3), np.nan), diverging=True).rgb().shape[2] == 3


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(ValueError, match=r"`values` must have shape \(heads, heads\), got \(2, 3\)"):
        pair_matrix(np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"`values` must have shape \(heads, heads\), got \(0, 0\)"):
        pair_matrix(np.zeros((0, 0)))
    with pytest.raises(ValueError, match=r"`parts` must hold numbers of heads that add up to 2, got \[1, 2\]"):
        pair_matrix(np.zeros((2, 2)), parts=[1, 2])
    with pytest.raises(ValueError, match=r"`part_labels` must hold one entry per part \(1\), got 2"):
        pair_matrix(np.zeros((2, 2)), part_labels=["a", "b"])
    with pytest.raises(ValueError, match=r"`labels` must hold one entry per head \(2\), got 1"):
        pair_matrix(np.zeros((2, 2)), labels=["a"])
    with pytest.raises(ValueError, match=r"`colours` must hold one entry per head \(2\), got 3"):
        pair_matrix(np.zeros((2, 2)), colours=head_colours(3))
