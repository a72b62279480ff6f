"""Clusters of heads that look at the same keys: how many, which, how sure, and which heads are redundant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attn_callbacks._checks import at_least, in_range, one_of
from attn_callbacks.analysis._head_clusters import Head, HeadClusters, RedundantPair
from attn_callbacks.analysis._hierarchy import best_cut, cut, tree
from attn_callbacks.analysis.partitions import adjusted_rand_index, classical_layout, silhouettes

__all__ = ["HeadClusters", "RedundantPair", "cluster_heads"]

Reals = NDArray[np.float64]
_METHODS = ("ward", "average", "complete", "single")


def cluster_heads(
    distances: Tensor,
    *,
    layer_names: Sequence[str] | None = None,
    heads_per_layer: Sequence[int] | None = None,
    clusters: int | None = None,
    most_clusters: int = 10,
    method: str = "ward",
    redundant: float = 0.3,
    resamples: int = 20,
    seed: int = 0,
) -> HeadClusters:
    """Group heads by the distances between them, with what is needed to doubt the groups.

    Hierarchical clustering, cut where the mean silhouette is largest, or into ``clusters``; all heads are one cluster
    where no cut has a silhouette above 0. Many heads and few samples make clusters of chance: give distances sample by
    sample, and they are combined by the root of their mean square, and clustered again ``resamples`` times over samples
    drawn with replacement. For 72 heads and 64 samples a tenth of a second.

    Args:
        distances: Output of :func:`~attn_callbacks.functional.head_distance` or
            :func:`~attn_callbacks.analysis.head_distances`, of one batch or several; or one matrix for all samples.
        layer_names: Names of the layers; ``None`` numbers them.
        heads_per_layer: Number of heads of each layer in the order of the rows; ``None`` divides rows evenly among
            ``layer_names``, or takes them for one layer.
        clusters: How many to make; ``None`` lets the silhouette choose.
        most_clusters: Largest number to choose from.
        method: How far two clusters are apart: by how much a merge spreads them (``"ward"``, for distances in a
            Euclidean space, which these are), or the ``"average"``, largest (``"complete"``) or smallest
            (``"single"``) distance of their heads; the last three are apt to split single heads off.
        redundant: Heads nearer than this are redundant pairs. A declared heuristic.
        resamples: How often to cluster resampled samples.
        seed: Seed of the resamples.

    Shape:
        - distances: ``(samples, heads, heads)`` or ``(heads, heads)``

    Raises:
        ImportError: If scipy is not installed.
        ValueError: If distances are not square, not symmetric, negative or infinite, some pair is NaN although both
            heads are known, fewer than two heads are known, or another argument does not fit.

    Example:
        >>> places = torch.tensor([0.0, 0.1, 0.9, 1.0])  # four heads on a line
        >>> found = cluster_heads((places[:, None] - places).abs(), heads_per_layer=[2, 2], redundant=0.2)
        >>> found.labels.tolist(), found.clusters, [pair.second for pair in found.redundant]
        ([[0, 0], [1, 1]], 2, [(0, 1), (1, 1)])

    References:
        Clark et al., "What Does BERT Look At?", 2019, section 6 (clusters of heads); Kaufman and Rousseeuw, "Finding
        Groups in Data", 1990, chapters 2 and 5; Ward, "Hierarchical Grouping to Optimize an Objective Function", 1963.
        The threshold of redundancy is ours.
    """
    one_of("method", method, _METHODS)
    at_least("most_clusters", most_clusters, 2)
    at_least("resamples", resamples, 0)
    in_range("redundant", redundant, 0.0, 1.0)
    squares = _squares(distances)
    sizes, names = _layers(squares.shape[-1], layer_names, heads_per_layer)
    known, combined, error = _combined(squares)
    if clusters is not None and not 1 <= clusters <= len(known):
        raise ValueError(f"`clusters` must lie between 1 and the {len(known)} known heads, got {clusters}.")
    linkage, order = tree(combined, method)
    chosen, means = best_cut(linkage, combined, most_clusters)
    chosen = chosen if clusters is None else clusters
    labels = cut(linkage, chosen)
    places, share = classical_layout(combined)
    stability = _stability(squares[:, known][:, :, known], labels, chosen, method, resamples, seed)
    every = [(layer, head) for layer, size in enumerate(sizes) for head in range(size)]
    heads = tuple(every[row] for row in known)
    shape = (len(sizes), max(sizes))
    return HeadClusters(
        labels=_spread(labels, heads, shape, -1),
        silhouette=_spread(silhouettes(combined, labels), heads, shape, torch.nan),
        layout=_spread(places, heads, (*shape, 2), torch.nan),
        layout_share=share,
        clusters=chosen,
        mean_silhouettes=means,
        heads=heads,
        distances=torch.from_numpy(combined),
        standard_error=torch.from_numpy(error),
        order=torch.from_numpy(order),
        linkage=torch.from_numpy(linkage),
        redundant=_near(combined, error, heads, redundant),
        stability=torch.from_numpy(stability),
        layer_names=names,
    )


def _squares(distances: Tensor) -> Reals:
    """Return squared distances ``(samples, heads, heads)``."""
    shape = tuple(distances.shape)
    if distances.ndim not in (2, 3) or shape[-1] != shape[-2] or 0 in shape:
        raise ValueError(f"`distances` must have shape (samples, heads, heads) or (heads, heads), got {shape}.")
    values = distances.detach().double().cpu().numpy()
    if (values < 0).any() or not np.allclose(values, np.swapaxes(values, -1, -2), atol=1e-6, equal_nan=True):
        raise ValueError("`distances` must be symmetric and at least 0. Give the output of `head_distance`.")
    if np.isinf(values).any():
        raise ValueError("`distances` must be finite, or NaN for heads that cannot be compared, got infinity.")
    return np.asarray((values if values.ndim == 3 else values[None]) ** 2)


def _layers(rows: int, names: Sequence[str] | None, sizes: Sequence[int] | None) -> tuple[list[int], tuple[str, ...]]:
    if sizes is None:
        layers = 1 if names is None else len(names)
        if not layers or rows % layers:
            raise ValueError(f"{rows} heads do not divide evenly among {layers} layers. Give `heads_per_layer`.")
        sizes = [rows // layers] * layers
    names = [f"layer {layer}" for layer in range(len(sizes))] if names is None else names
    if len(names) != len(sizes) or sum(sizes) != rows or min(sizes) < 1:
        raise ValueError(
            f"`heads_per_layer` must have one number per layer name ({len(names)}) and add up to the {rows} heads of "
            f"`distances`, got {list(sizes)}."
        )
    return list(sizes), tuple(names)


def _combined(squares: Reals) -> tuple[NDArray[np.intp], Reals, Reals]:
    """Return the rows of known heads, their distances over all samples, and the standard errors of these."""
    others = ~np.eye(squares.shape[-1], dtype=bool)
    known = np.flatnonzero((~np.isnan(squares).all(axis=0) & others).any(axis=1))
    squares = squares[:, known][:, :, known]
    counted = (~np.isnan(squares)).sum(axis=0)
    if len(known) < 2 or not counted.all():
        raise ValueError(
            "`distances` must tell how far each head is from every other in some sample, at least two of them. Leave "
            "out heads that cannot be compared."
        )
    mean = np.nansum(squares, axis=0) / counted
    np.fill_diagonal(mean, 0.0)
    spread = np.nansum((squares - mean) ** 2, axis=0) / np.maximum(counted - 1, 1) / counted
    distance = np.sqrt(mean)
    slope = 1 / (2 * np.where(distance == 0, 1.0, distance))  # of the root
    return known, distance, np.where(counted < 2, np.nan, np.sqrt(spread) * slope)


def _stability(
    squares: Reals, labels: NDArray[np.int64], clusters: int, method: str, resamples: int, seed: int
) -> Reals:
    samples = len(squares)
    if samples < 2:
        return np.empty(0)
    generator = np.random.default_rng(seed)
    times = generator.multinomial(samples, np.full(samples, 1 / samples), size=resamples).astype(np.float64)
    known = ~np.isnan(squares).reshape(samples, -1)
    counts = times @ known
    sums = times @ np.nan_to_num(squares).reshape(samples, -1)
    found = []
    for total, count in zip(sums, counts, strict=True):
        if (count == 0).any():
            continue  # the samples that knew some pair were not drawn
        again = np.sqrt(total / count).reshape(squares.shape[1:])
        found.append(adjusted_rand_index(labels, cut(tree(again, method, ordered=False)[0], clusters)))
    return np.array(found)


def _near(distances: Reals, error: Reals, heads: tuple[Head, ...], limit: float) -> tuple[RedundantPair, ...]:
    first, second = np.nonzero(np.triu(distances < limit, 1))
    nearest = np.argsort(distances[first, second], kind="stable")
    return tuple(
        RedundantPair(heads[one], heads[other], float(distances[one, other]), float(error[one, other]))
        for one, other in zip(first[nearest], second[nearest], strict=True)
    )


def _spread(values: NDArray[Any], heads: tuple[Head, ...], shape: tuple[int, ...], missing: float) -> Tensor:
    """Put the value of each known head at its layer and number."""
    full = torch.full(shape, missing, dtype=torch.from_numpy(values).dtype)
    layers, numbers = (torch.tensor(axis) for axis in zip(*heads, strict=True))
    full[layers, numbers] = torch.from_numpy(values)
    return full
