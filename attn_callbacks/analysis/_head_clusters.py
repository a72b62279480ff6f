"""What clustering of heads finds: clusters, what they rest on, and how sure they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attn_callbacks._plain import plain
from attn_callbacks.analysis.partitions import adjusted_rand_index

__all__ = ["Head", "HeadClusters", "RedundantPair"]

Head = tuple[int, int]
"""Number of its layer, and its own: `ablate_heads` and others take heads in this form too."""


@dataclass(frozen=True)
class RedundantPair:
    """Two heads that lie close together.

    Args:
        first: Layer and head.
        second: Layer and head.
        distance: How far they lie apart.
        standard_error: Of ``distance`` over samples; NaN where samples are not known.
    """

    first: Head
    second: Head
    distance: float
    standard_error: float


@dataclass(frozen=True, eq=False)
class HeadClusters:
    """What `cluster_heads` finds. Tensors are on the CPU.

    Heads that do not exist or have no distance are -1 in ``labels``, NaN in ``silhouette`` and ``layout``, and missing
    from ``heads``, which names the rows of all matrices.

    Args:
        labels: Cluster of each head, ``(layers, heads)``. Cluster 0 is the largest.
        silhouette: How much nearer each head is to its own cluster than to the next, ``(layers, heads)``.
        layout: Place of each head in a plane that keeps distances as well as a plane can, ``(layers, heads, 2)``.
        layout_share: Share of the spread of all heads that the plane shows.
        clusters: How many there are.
        mean_silhouettes: Mean silhouette of 2, 3, ... clusters, of which the best was taken. Above 0.7 is a strong
            structure, above 0.5 a reasonable one; 0.25 and less is none (Kaufman and Rousseeuw 1990).
        heads: Layer and head of each row of ``distances``.
        distances: Distance of each pair over all samples, ``(rows, rows)``.
        standard_error: Of ``distances`` over samples; NaN where samples are not known.
        order: Rows as they stand below a dendrogram, ``(rows,)``.
        linkage: The tree as scipy writes it, ``(rows - 1, 4)``.
        redundant: Pairs below the threshold, nearest first.
        stability: Adjusted Rand index of the clusters of each resample against these, ``(resamples,)``.
        layer_names: Names of the layers.
    """

    labels: Tensor
    silhouette: Tensor
    layout: Tensor
    layout_share: float
    clusters: int
    mean_silhouettes: tuple[float, ...]
    heads: tuple[Head, ...]
    distances: Tensor
    standard_error: Tensor
    order: Tensor
    linkage: Tensor
    redundant: tuple[RedundantPair, ...]
    stability: Tensor
    layer_names: tuple[str, ...]

    @property
    def mean_silhouette(self) -> float:
        """Mean silhouette of all heads, NaN for one cluster."""
        return float(self.silhouette.nanmean())

    @property
    def mean_stability(self) -> float:
        """Mean of ``stability``: 1 where resampled samples give the same clusters, NaN where samples are not known."""
        return float(self.stability.mean()) if len(self.stability) else float("nan")

    @property
    def head_names(self) -> tuple[str, ...]:
        """``layer.head`` of each row of ``distances``, in numbers."""
        return tuple(f"{layer}.{head}" for layer, head in self.heads)

    def row_labels(self) -> Tensor:
        """Return the cluster of each row of ``distances``."""
        return torch.stack([self.labels[head] for head in self.heads])

    def agreement(self, other: HeadClusters) -> float:
        """Return the adjusted Rand index of two sets of clusters, such as of two epochs, over the heads of both.

        Raises:
            ValueError: If no head is in both.
        """
        both = [head for head in self.heads if head in set(other.heads)]
        if not both:
            raise ValueError("`other` must have clusters of some of the same heads, got none.")
        mine, others = (np.array([int(found.labels[head]) for head in both]) for found in (self, other))
        return adjusted_rand_index(mine, others)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, lists and strings; NaN becomes ``None``."""
        found: dict[str, Any] = {**vars(self), "redundant": [vars(pair) for pair in self.redundant]}
        means = {"mean_silhouette": self.mean_silhouette, "mean_stability": self.mean_stability}
        return {name: plain(value) for name, value in {**found, **means}.items()}
