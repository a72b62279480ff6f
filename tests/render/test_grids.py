"""Layer by head grids and confusion pictures: colours, printed numbers, missing values, many shapes."""

from __future__ import annotations

import numpy as np
import pytest

from attn_callbacks.render import confusion_picture, diverging, layer_head_grid, sequential
from attn_callbacks.render.layers import _numbers, shared_path, short_layer_names
from attn_callbacks.render.matrix import shades
from tests.render.decoding import decoded, has


def count(picture, colour):
    """Return how many pixels have a colour."""
    return int((decoded(picture) == colour).all(axis=-1).sum())


def test_shades_run_from_low_to_high():
    palette = sequential(11)
    values = np.array([0.0, 0.5, 1.0, -3.0, 9.0, np.nan])
    expected = palette[[0, 5, 10, 0, 10, 0]]
    np.testing.assert_array_equal(shades(values, 0.0, 1.0, palette), expected)
    np.testing.assert_array_equal(shades(values[:2], 1.0, 1.0, palette), palette[[0, 0]])


def test_the_extremes_have_the_extreme_colours():
    values = np.array([[0.0, 1.0], [0.5, 0.5]])
    picture, palette = layer_head_grid(values, title="entropy"), sequential()
    for colour in (palette[0], palette[-1], palette[128]):
        assert count(picture, colour) > 300


def test_missing_heads_are_hatched():
    values = np.full((3, 4), 0.5)
    values[0, 1] = np.nan
    full, holed = layer_head_grid(np.full((3, 4), 0.5)), layer_head_grid(values)
    assert not has(full, (244, 245, 246))
    assert count(holed, (244, 245, 246)) > 100
    assert full.rgb().shape == holed.rgb().shape


def test_diverging_has_its_middle_at_zero():
    picture = layer_head_grid(np.array([[-0.2, 0.0, 0.4]]), diverging=True)
    assert count(picture, diverging()[127]) > 300
    assert count(picture, diverging()[-1]) > 300
    assert count(picture, diverging()[0]) < 100  # only in the colour bar: no value reaches -0.4


def test_numbers_are_printed_where_they_fit():
    few, many = layer_head_grid(np.full((2, 4), 0.123)), layer_head_grid(np.full((2, 200), 0.123))
    white = [(decoded(picture)[95:140, 70:100] == 255).all(axis=-1).mean() for picture in (few, many)]
    assert white[0] > 0
    assert many.width <= 1600


def test_a_given_scale_is_kept():
    picture = layer_head_grid(np.array([[0.5, 0.5]]), low=0.0, high=1.0)
    assert count(picture, sequential()[128]) > 500


@pytest.mark.parametrize(
    ("values", "printed"),
    [
        ([3.14159, 0.5], ["3.14", "0.50"]),
        ([0.0321, 0.004], ["0.0321", "0.0040"]),
        ([123.4, 5.0], ["123", "5"]),
        ([2e-5, np.nan], ["2e-05", ""]),
        ([0.0, 0.0], ["0", "0"]),
    ],
)
def test_printed_numbers(values, printed):
    assert _numbers(np.array([values])) == [printed]


def test_what_layer_names_share_moves_to_the_caption():
    names = [f"bert.encoder.layer.{index}.attention.self" for index in range(3)]
    assert short_layer_names(names) == ["layer 0", "layer 1", "layer 2"]
    assert shared_path(names) == "bert.encoder.layer.*.attention.self"
    assert (short_layer_names(["a.self", "a.cross"]), shared_path(["a.self", "a.cross"])) == (["self", "cross"], "a.*")
    for unlike in (["x", "y"], ["only.one"], ["a.b", "a.b.c"], ["same", "same"]):
        assert (short_layer_names(unlike), shared_path(unlike)) == (unlike, "")
    assert (short_layer_names(None, 2), shared_path(None)) == (["layer 0", "layer 1"], "")


@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (48, 64), (100, 1), (12, 12)])
@pytest.mark.parametrize("fill", [0.5, np.nan])
def test_grid_sizes(shape, fill):
    picture = layer_head_grid(np.full(shape, fill), title="a long title " * 30, layer_labels=["é" * 90] * shape[0])
    assert picture.width <= 1600
    assert picture.height <= 2400
    np.testing.assert_array_equal(decoded(picture), picture.rgb())


def test_grid_checks():
    with pytest.raises(ValueError, match=r"`values` must have 2 axes, got shape \(3,\)"):
        layer_head_grid(np.ones(3))
    with pytest.raises(ValueError, match="`values` must hold at least one value"):
        layer_head_grid(np.ones((0, 3)))
    with pytest.raises(ValueError, match=r"`layer_labels` must hold one entry per layer \(2\), got 1"):
        layer_head_grid(np.ones((2, 3)), layer_labels=["a"])


def test_confusion_colours_are_shares_of_the_true_class():
    small = confusion_picture(np.array([[9, 1], [1, 1]]), ["a", "b"])
    large = confusion_picture(np.array([[90, 10], [500, 500]]), ["a", "b"])
    palette = sequential()
    for share in (0.9, 0.1, 0.5):
        colour = palette[round(share * 255)]
        assert count(small, colour) > 1000
        assert count(large, colour) > 1000


def test_confusion_of_an_absent_class_is_hatched():
    assert has(confusion_picture(np.array([[3, 1], [0, 0]])), (244, 245, 246))
    assert not has(confusion_picture(np.array([[3, 1], [0, 1]])), (244, 245, 246))


def test_confusion_prints_counts_and_names():
    counts = np.array([[80, 20], [5, 95]])
    first = decoded(confusion_picture(counts, ["cat", "dog"]))
    assert (first != decoded(confusion_picture(counts * 10, ["cat", "dog"]))).any()  # same shares, other counts
    assert (first != decoded(confusion_picture(counts, ["cat", "cow"]))).any()


def test_confusion_by_group_has_one_panel_each():
    counts = np.array([[[9, 1], [0, 9]], [[1, 9], [0, 9]], [[0, 0], [2, 2]]])
    one = confusion_picture(counts[0])
    several = confusion_picture(counts, group_names=["x", "y", "z"])
    assert several.height > one.height  # room for the names of the groups
    assert confusion_picture(np.tile(counts, (2, 1, 1))).width > several.width
    assert count(several, sequential()[round(0.9 * 255)]) >= 2 * count(one, sequential()[round(0.9 * 255)]) - 100
    alone = confusion_picture(counts[:1])
    np.testing.assert_array_equal(decoded(alone), decoded(one))


@pytest.mark.parametrize("classes", [1, 2, 8, 9, 12, 500])
@pytest.mark.parametrize("groups", [0, 3])
def test_confusion_sizes(classes, groups):
    shape = (groups, classes, classes) if groups else (classes, classes)
    picture = confusion_picture(np.ones(shape, int), title="confusion")
    assert picture.width <= 1600
    assert decoded(picture).shape == (picture.height, picture.width, 3)


def test_confusion_checks():
    for shape in ((2,), (2, 3), (1, 2, 3), (0, 0)):
        with pytest.raises(ValueError, match=r"`counts` must have shape \(groups, classes, classes\)"):
            confusion_picture(np.ones(shape))
    with pytest.raises(ValueError, match=r"`class_names` must hold one entry per class \(2\), got 1"):
        confusion_picture(np.ones((2, 2)), ["a"])
    with pytest.raises(ValueError, match=r"`group_names` must hold one entry per group \(3\), got 1"):
        confusion_picture(np.ones((3, 2, 2)), group_names=["a"])
