"""Partitions of points: how alike two are, how well points lie in theirs, and a plane to see them in."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["adjusted_rand_index", "classical_layout", "silhouettes"]

Reals = NDArray[np.float64]
Labels = NDArray[Any]


def adjusted_rand_index(first: Labels, second: Labels) -> float:
    """Compare two partitions of the same points: 1 for the same one, about 0 for two drawn by chance.

    How the parts are numbered does not matter. Two partitions that are both one part, or both single points, are the
    same.

    Args:
        first: Number of the part of each point.
        second: The same, in the other partition.

    Shape:
        - first, second: ``(points,)``

    Raises:
        ValueError: If the two do not hold the same number of points, or none.

    Example:
        >>> adjusted_rand_index(np.array([0, 0, 1, 1]), np.array([1, 1, 0, 0]))
        1.0
        >>> round(adjusted_rand_index(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 2])), 3)
        0.571

    References:
        Hubert and Arabie, "Comparing Partitions", 1985, equation 5.
    """
    first, second = np.asarray(first), np.asarray(second)
    if first.shape != second.shape or first.ndim != 1 or not first.size:
        raise ValueError(f"`first` and `second` must hold the same points, got {first.shape} and {second.shape}.")
    rows, columns = (np.unique(labels, return_inverse=True)[1] for labels in (first, second))
    table = np.zeros((rows.max() + 1, columns.max() + 1))
    np.add.at(table, (rows, columns), 1)
    together, in_first, in_second = (_pairs(counts) for counts in (table, table.sum(axis=1), table.sum(axis=0)))
    expected = in_first * in_second / max(_pairs(np.array([first.size])), 1.0)
    most = (in_first + in_second) / 2
    return 1.0 if most == expected else float((together - expected) / (most - expected))


def silhouettes(distances: Reals, labels: Labels) -> Reals:
    """Measure how much nearer each point is to its own cluster than to the next: from -1 to 1.

    ``(b - a) / max(a, b)`` with the mean distance ``a`` to the other points of the cluster and ``b`` to those of the
    nearest other one; 0 for a point alone in its cluster.

    Args:
        distances: Distance of each pair of points.
        labels: Number of the cluster of each point, from 0 on without gaps.

    Shape:
        - distances: ``(points, points)``
        - labels: ``(points,)``
        - output: ``(points,)``; NaN where there is only one cluster

    Example:
        >>> line = np.array([0.0, 1.0, 4.0, 5.0])
        >>> silhouettes(np.abs(line[:, None] - line), np.array([0, 0, 1, 1])).round(3).tolist()
        [0.778, 0.714, 0.714, 0.778]

    References:
        Rousseeuw, "Silhouettes: a Graphical Aid to the Interpretation and Validation of Cluster Analysis", 1987.
    """
    member = np.eye(int(labels.max()) + 1)[labels]  # (points, clusters)
    if member.shape[1] < 2:
        return np.full(len(labels), np.nan)
    sums, sizes = distances @ member, member.sum(axis=0)
    own = (sums * member).sum(axis=1) / np.maximum(sizes[labels] - 1, 1)
    other = np.where(member == 1, np.inf, sums / sizes).min(axis=1)
    larger = np.maximum(own, other)
    values = (other - own) / np.where(larger == 0, 1.0, larger)
    return np.asarray(np.where(sizes[labels] == 1, 0.0, values))


def classical_layout(distances: Reals, axes: int = 2) -> tuple[Reals, float]:
    """Place points so that their distances are kept as well as ``axes`` axes can: classical scaling.

    Each axis points to where its farthest point is, so that the same distances give the same picture.

    Args:
        distances: Distance of each pair of points.
        axes: Number of axes.

    Shape:
        - distances: ``(points, points)``

    Returns:
        Places ``(points, axes)``, centred, and the share of the spread of all points that they show (1 where there is
        none).

    Example:
        >>> line = np.array([0.0, 1.0, 4.0])
        >>> places, share = classical_layout(np.abs(line[:, None] - line), axes=1)
        >>> places[:, 0].round(3).tolist(), round(share, 3)
        ([-1.667, -0.667, 2.333], 1.0)

    References:
        Torgerson, "Multidimensional Scaling: I. Theory and Method", 1952.
    """
    points = len(distances)
    centring = np.eye(points) - 1.0 / max(points, 1)
    values, vectors = np.linalg.eigh(-0.5 * centring @ distances**2 @ centring)
    places = np.zeros((points, axes))
    shown = min(axes, points)
    places[:, :shown] = (vectors * np.sqrt(values.clip(0.0)))[:, ::-1][:, :shown]
    farthest = np.abs(places).argmax(axis=0)
    places *= np.where(places[farthest, np.arange(axes)] < 0, -1.0, 1.0)
    spread = values.clip(0.0).sum()
    return places, float(values[::-1][:axes].clip(0.0).sum() / spread) if spread > 0 else 1.0


def _pairs(counts: Reals) -> float:
    return float((counts * (counts - 1) / 2).sum())
