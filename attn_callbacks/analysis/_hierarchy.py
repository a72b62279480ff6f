"""A tree of points by their distances, and where to cut it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from attn_callbacks.analysis.partitions import silhouettes

__all__ = ["best_cut", "cut", "tree"]

Reals = NDArray[np.float64]


def tree(distances: Reals, method: str, *, ordered: bool = True) -> tuple[Reals, NDArray[np.int64]]:
    """Return the linkage ``(points - 1, 4)`` as scipy writes it, and points in the order of its leaves.

    Args:
        distances: Distance of each pair, ``(points, points)``.
        method: What scipy calls the distance of two clusters.
        ordered: Turn branches so that neighbours are near each other.

    Raises:
        ImportError: If scipy is not installed.
    """
    hierarchy, squareform = _scipy()
    pairs = squareform(distances, checks=False)
    linkage = np.asarray(hierarchy.linkage(pairs, method, optimal_ordering=ordered), dtype=np.float64)
    return linkage, np.asarray(hierarchy.leaves_list(linkage), dtype=np.int64)


def cut(linkage: Reals, clusters: int) -> NDArray[np.int64]:
    """Return the cluster of each point, ``(points,)``; the largest is number 0, of equal ones that of the first point.

    Unlike a cut at a height, it makes as many clusters as were asked for where several merges have one height.
    """
    points = len(linkage) + 1
    members = {point: [point] for point in range(points)}
    for number, (left, right, *_) in enumerate(linkage[: points - clusters]):
        members[points + number] = sorted(members.pop(int(left)) + members.pop(int(right)))
    labels = np.empty(points, dtype=np.int64)
    for label, part in enumerate(sorted(members.values(), key=lambda part: (-len(part), part[0]))):
        labels[part] = label
    return labels


def best_cut(linkage: Reals, distances: Reals, most: int) -> tuple[int, tuple[float, ...]]:
    """Return the number of clusters with the largest mean silhouette, 1 if none is above 0; and all means from 2 on."""
    counts = range(2, min(most, len(linkage)) + 1)
    means = tuple(float(silhouettes(distances, cut(linkage, count)).mean()) for count in counts)
    return (1 if not means or max(means) <= 0 else 2 + means.index(max(means))), means


def _scipy() -> tuple[Any, Any]:
    try:
        from scipy.cluster import hierarchy
        from scipy.spatial.distance import squareform
    except ImportError:
        raise ImportError("`cluster_heads` needs scipy. Install it with `attn-callbacks[analysis]`.") from None
    return hierarchy, squareform
