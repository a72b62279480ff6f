"""Agreement of partitions, silhouettes and layouts against loops, hand-computed cases and scikit-learn."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from attn_callbacks.analysis.partitions import adjusted_rand_index, classical_layout, silhouettes


def points(count: int, axes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, axes))


def between(places: np.ndarray) -> np.ndarray:
    return np.linalg.norm(places[:, None] - places, axis=-1)


def labels(count: int, parts: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).permutation(np.arange(count) % parts)


def rand_by_pairs(first: np.ndarray, second: np.ndarray) -> float:
    pairs = [(first[i] == first[j], second[i] == second[j]) for i, j in combinations(range(len(first)), 2)]
    a, b, both = (
        sum(values) for values in ([one for one, _ in pairs], [two for _, two in pairs], [x and y for x, y in pairs])
    )
    expected = a * b / len(pairs)
    return (both - expected) / ((a + b) / 2 - expected)


@pytest.mark.parametrize("parts", [(2, 3), (4, 4), (1, 5)])
def test_rand_index_is_that_over_all_pairs(parts: tuple[int, int]) -> None:
    first, second = labels(20, parts[0]), labels(20, parts[1], seed=1)
    assert adjusted_rand_index(first, second) == pytest.approx(rand_by_pairs(first, second))


def test_rand_index_is_that_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    for seed in range(5):
        first, second = labels(30, 3, seed), labels(30, 4, seed + 50)
        assert adjusted_rand_index(first, second) == pytest.approx(metrics.adjusted_rand_score(first, second))


def test_equal_partitions_agree_however_they_are_numbered() -> None:
    first = labels(12, 3)
    assert adjusted_rand_index(first, (first + 1) % 3 * 7 - 2) == 1
    assert adjusted_rand_index(np.zeros(4), np.zeros(4)) == 1
    assert adjusted_rand_index(np.arange(4), np.arange(4)[::-1]) == 1
    assert adjusted_rand_index(np.zeros(1), np.zeros(1)) == 1


def test_rand_index_of_chance_is_about_zero() -> None:
    values = [adjusted_rand_index(labels(60, 3, seed), labels(60, 3, seed + 1000)) for seed in range(200)]
    assert abs(np.mean(values)) < 0.01


def test_partitions_of_other_points_are_refused() -> None:
    for second in (np.zeros(3), np.zeros((4, 1))):
        with pytest.raises(ValueError, match="must hold the same points"):
            adjusted_rand_index(np.zeros(4), second)


def test_silhouettes_of_a_line_by_hand() -> None:
    line = np.array([[0.0], [1.0], [4.0], [5.0], [9.0]])
    found = silhouettes(between(line), np.array([0, 0, 1, 1, 2]))
    np.testing.assert_allclose(found, [(4.5 - 1) / 4.5, (3.5 - 1) / 3.5, (3.5 - 1) / 3.5, (4 - 1) / 4, 0.0])


def test_silhouettes_are_those_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    distances, parts = between(points(25, 3)), labels(25, 4)
    found = silhouettes(distances, parts)
    np.testing.assert_allclose(found, metrics.silhouette_samples(distances, parts, metric="precomputed"))


def test_silhouettes_without_another_cluster_or_any_distance() -> None:
    assert np.isnan(silhouettes(between(points(4, 2)), np.zeros(4, int))).all()
    assert silhouettes(np.zeros((4, 4)), np.array([0, 0, 1, 1])).tolist() == [0.0] * 4


def test_a_layout_keeps_the_distances_of_a_plane() -> None:
    distances = between(points(9, 2))
    places, share = classical_layout(distances)
    np.testing.assert_allclose(between(places), distances, atol=1e-9)
    np.testing.assert_allclose(places.mean(axis=0), 0, atol=1e-9)
    assert share == pytest.approx(1)
    assert (places.max(axis=0) >= -places.min(axis=0)).all()


def test_a_layout_of_more_axes_shows_the_widest_two() -> None:
    wide = points(200, 4) * [5.0, 3.0, 0.5, 0.1]
    places, share = classical_layout(between(wide))
    spread = (wide - wide.mean(axis=0)).var(axis=0)
    assert share == pytest.approx(spread[:2].sum() / spread.sum(), abs=0.01)
    assert np.corrcoef(places[:, 0], wide[:, 0])[0, 1] ** 2 > 0.99


@pytest.mark.parametrize("count", [1, 2])
def test_a_layout_of_few_points(count: int) -> None:
    places, share = classical_layout(between(points(count, 2)))
    assert places.shape == (count, 2)
    assert share == pytest.approx(1)
