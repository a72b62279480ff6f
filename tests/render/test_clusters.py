"""Pictures of clusters: colours, the order of the tree, and names where there is room."""

from __future__ import annotations

import numpy as np
import pytest

from attn_callbacks.render import head_colours, sequential
from attn_callbacks.render.clusters import NONE, cluster_colours, cluster_layout, cluster_matrix

DISTANCES = np.array([[0.0, 0.9, 0.2, 0.8], [0.9, 0.0, 0.7, 0.3], [0.2, 0.7, 0.0, 0.6], [0.8, 0.3, 0.6, 0.0]])
LABELS, ORDER = np.array([0, 1, 0, 1]), np.array([0, 2, 3, 1])
TREE = np.array([[0, 2, 0.2, 2], [1, 3, 0.3, 2], [4, 5, 0.75, 4]])


def holds(pixels: np.ndarray, colour: object) -> np.ndarray:
    return (pixels == np.asarray(colour, np.uint8)).all(axis=-1)


def test_a_cluster_has_the_same_colour_wherever_it_is_drawn() -> None:
    labels = np.array([[0, 2, -1], [1, 1, 0]])
    found = cluster_colours(labels)
    assert found.shape == (2, 3, 3)
    assert found.dtype == np.uint8
    assert tuple(found[0, 2]) == NONE
    np.testing.assert_array_equal(found[1], head_colours(2)[[1, 1, 0]])
    np.testing.assert_array_equal(cluster_colours(labels[:, :1])[0, 0], found[0, 0])
    assert cluster_colours(np.full((2,), -1)).tolist() == [list(NONE)] * 2


def test_cells_are_in_the_order_of_the_tree() -> None:
    pixels = cluster_matrix(DISTANCES, LABELS, TREE, ORDER).rgb()
    darkest = holds(pixels, sequential()[0])
    rows, columns = np.nonzero(darkest[60:, :])  # below the header, whose scale has the colour as well
    # zero is on the diagonal only: four cells, of 26 pixels less the lines between them
    assert 4 * 25 * 25 <= len(rows) <= 4 * 26 * 26
    top, left = rows.min() + 60, columns.min()
    shades = [tuple(pixels[top + 5, left + 26 * place + 5]) for place in range(4)]
    expected = sequential()[np.rint(DISTANCES[0, ORDER] / 0.9 * 255).astype(int)]
    assert shades == [tuple(colour) for colour in expected]


def test_edges_have_the_colours_of_the_clusters() -> None:
    pixels = cluster_matrix(DISTANCES, LABELS, TREE, ORDER).rgb()
    first, second = (holds(pixels, colour) for colour in head_colours(2))
    assert first.sum() == second.sum() == 2 * 10 * 2 * 26  # two edges, ten pixels wide, two heads each
    edge = np.argwhere(first)[0, 0]
    columns = [np.flatnonzero(colour[edge]) for colour in (first, second)]
    assert [np.ptp(own) + 1 for own in columns] == [52, 52]  # heads of a cluster stand together
    assert columns[0].max() < columns[1].min()


def test_the_tree_is_as_high_as_its_parts_are_apart() -> None:
    pixels = cluster_matrix(DISTANCES, LABELS, TREE, ORDER).rgb()
    strip = np.argwhere(holds(pixels, head_colours(2)[0]))[:, 0].min()
    ink = holds(pixels, (32, 33, 36))[42:strip]
    bridges = [row for row in range(len(ink)) if ink[row].sum() >= 26]
    heights = [strip - 42 - 4 - row for row in bridges]
    np.testing.assert_allclose(np.array(heights) / heights[0], [1, 0.3 / 0.75, 0.2 / 0.75], atol=0.01)


def test_many_heads_make_no_larger_a_picture_than_a_screen() -> None:
    hierarchy = pytest.importorskip("scipy.cluster.hierarchy")
    points = np.random.default_rng(0).random((288, 3))
    distances = np.linalg.norm(points[:, None] - points, axis=-1)
    linkage = hierarchy.linkage(points)
    order = hierarchy.leaves_list(linkage)
    picture = cluster_matrix(distances, np.arange(288) % 9, linkage, order, names=[f"layer {n}" for n in range(288)])
    assert picture.width < 1000
    assert picture.height < 1200


def test_an_unknown_distance_is_hatched_and_one_head_is_enough() -> None:
    distances = DISTANCES.copy()
    distances[0, 1] = distances[1, 0] = np.nan
    assert cluster_matrix(distances, LABELS, TREE, ORDER).height > 0
    assert cluster_matrix(np.zeros((1, 1)), np.zeros(1, int), np.zeros((0, 4)), np.zeros(1, int)).height > 0


def test_dots_stand_where_their_heads_are() -> None:
    places = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [np.nan, np.nan]])
    picture = cluster_layout(places, np.array([0, 1, 2, 3]), title="heads")
    spots = [np.argwhere(holds(picture.rgb(), colour)) for colour in head_colours(4)]
    assert not len(spots[3])
    (y0, x0), (y1, x1), (y2, x2) = (spot.mean(axis=0) for spot in spots[:3])
    assert (y0, x0) == pytest.approx((y1, x2))
    assert x1 - x0 == pytest.approx(y0 - y2)
    assert x1 > x0


def test_heads_at_one_place_are_drawn() -> None:
    assert cluster_layout(np.zeros((3, 2)), np.zeros(3, int), names=["a", "b", "c"]).height > 0
    assert cluster_layout(np.full((2, 2), np.nan), np.full(2, -1)).height > 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"distances": np.zeros((4, 3))}, "`distances` must have shape"),
        ({"linkage": TREE[:2]}, r"`linkage` must have shape \(heads - 1, 4\) = \(3, 4\)"),
        ({"order": np.array([0, 0, 1, 2])}, "`order` must name each of the 4 heads once"),
        ({"labels": LABELS[:3]}, "`labels` must hold one entry per head"),
        ({"names": ["a"]}, "`names` must hold one entry per head"),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict[str, object], message: str) -> None:
    arguments = {"distances": DISTANCES, "labels": LABELS, "linkage": TREE, "order": ORDER} | changed
    with pytest.raises(ValueError, match=message):
        cluster_matrix(**arguments)


def test_a_layout_of_other_shapes_is_refused() -> None:
    with pytest.raises(ValueError, match="`places` must have shape"):
        cluster_layout(np.zeros((3, 3)), np.zeros(3, int))
    with pytest.raises(ValueError, match="one entry per head"):
        cluster_layout(np.zeros((3, 2)), np.zeros(3, int), names=["a"])


def test_a_tree_that_is_not_known_is_refused():
    tree = TREE.copy()
    tree[0, 2] = np.nan
    with pytest.raises(ValueError, match="`linkage` must hold finite numbers"):
        cluster_matrix(DISTANCES, LABELS, tree, ORDER)
