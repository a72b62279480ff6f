"""What is told of the roles of heads: shares, pictures, sentences, and a table with everything."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attn_callbacks.analysis.clusters import HeadClusters
from attn_callbacks.callbacks._roles_timeline import RoleChange, RoleTimeline
from attn_callbacks.functional.role_labels import ROLE_LABELS
from attn_callbacks.functional.roles import ROLES
from attn_callbacks.metrics.roles import HeadRolesResult
from attn_callbacks.render import Picture, layer_head_grid
from attn_callbacks.render.clusters import cluster_layout, cluster_matrix
from attn_callbacks.render.layers import short_layer_names
from attn_callbacks.render.roles import role_grid, role_timeline

__all__ = [
    "MONITORED",
    "append_roles",
    "change_text",
    "cluster_pictures",
    "monitored_scalars",
    "redundant_text",
    "role_pictures",
    "share_scalars",
]

MONITORED = ("roles/short_range_mass", "roles/long_range_mass", "roles/drift")
"""Tags of the numbers that callbacks can monitor."""

_COLUMNS = ("epoch", "step", "layer", "head", "label", "strength", "strength_error", "margin", "agreement", "drift")
_MOST_LINES = 50


def monitored_scalars(result: HeadRolesResult, drift: Tensor) -> dict[str, float]:
    """Tag and value of what is known: means over all heads."""
    masses = (result.score[..., ROLES.index(name)] for name in ("local", "long_range"))
    means = {tag: float(values.nanmean()) for tag, values in zip(MONITORED, (*masses, drift), strict=True)}
    return {tag: value for tag, value in means.items() if value == value}  # NaN is not itself


def share_scalars(result: HeadRolesResult) -> dict[str, float]:
    """Tag and share of heads of every label that could be given."""
    label = result.labels().label
    known = max(int((label >= 0).sum()), 1)
    counts = torch.bincount(label[label >= 0], minlength=len(ROLE_LABELS)).tolist()
    possible = [*(~result.strength.isnan()).flatten(0, 1).any(dim=0).tolist(), True]
    return {
        f"roles/{name}": count / known for name, count, may in zip(ROLE_LABELS, counts, possible, strict=True) if may
    }


def change_text(changes: Sequence[RoleChange], unsure: int) -> str:
    """Return changes as a list in Markdown, and the number of those that are not sure; empty without any."""
    told = [f"epoch {change.epoch}: {change}" for change in changes]
    if unsure:
        more = "more " if told else ""
        told.append(f"{more}labels that differ from the last look without being sure: {unsure}")
    return _listed(told) if told else ""


def redundant_text(clusters: HeadClusters) -> str:
    """Return clusters in a sentence, and redundant pairs as a list in Markdown."""
    places = short_layer_names(clusters.layer_names)

    def told(head: tuple[int, int]) -> str:
        return f"{places[head[0]]} head {head[1]}"

    pairs = [f"{told(pair.first)} and {told(pair.second)}: distance {pair.distance:.2f}" for pair in clusters.redundant]
    sure = "" if np.isnan(clusters.mean_stability) else f", stability {clusters.mean_stability:.2f}"
    silhouette = "" if clusters.clusters < 2 else f" (silhouette {clusters.mean_silhouette:.2f}{sure})"
    summary = f"{len(clusters.heads)} heads in {clusters.clusters} clusters{silhouette}; redundant pairs: {len(pairs)}"
    return f"{summary}\n\n{_listed(pairs)}" if pairs else summary


def cluster_pictures(clusters: HeadClusters, when: str) -> dict[str, Callable[[], Picture]]:
    """Return by tag what draws distances in the order of the tree, and heads in a plane."""
    arrays = (part.numpy() for part in (clusters.distances, clusters.row_labels(), clusters.linkage, clusters.order))
    distances, labels, linkage, order = arrays
    names, places = clusters.head_names, np.array([clusters.layout[head].tolist() for head in clusters.heads])
    title, plane = f"distances between heads, {when}", f"heads in a plane, {when}"
    caption = f"near: the same keys; the plane shows {clusters.layout_share:.0%} of the spread"
    return {
        "roles/clusters": lambda: cluster_matrix(distances, labels, linkage, order, names=names, title=title),
        "roles/cluster_layout": lambda: cluster_layout(places, labels, names=names, title=plane, caption=caption),
    }


def role_pictures(
    result: HeadRolesResult,
    drift: Tensor,
    timeline: RoleTimeline | None,
    sure: Callable[[float | None], bool],
    title: str,
) -> dict[str, Callable[[], Picture]]:
    """Return by tag what draws roles, drift where it is known, and, where some head changed, the timeline."""
    labels = result.labels()
    certain = np.vectorize(sure, otypes=[bool])(labels.confidence.numpy())
    names, strength = result.layer_names, labels.strength.numpy()
    found: dict[str, Callable[[], Picture]] = {
        "roles/labels": partial(
            role_grid,
            labels.label.numpy(),
            ROLE_LABELS,
            strength=strength,
            sure=certain,
            layer_labels=names,
            title=f"roles, {title}",
        )
    }
    if not drift.isnan().all():
        found["roles/drift_by_head"] = partial(
            layer_head_grid, drift.numpy(), title=f"drift, {title}", layer_labels=names, low=0.0
        )
    history = None if timeline is None else _timeline(timeline)
    return found if history is None else {**found, "roles/timeline": history}


def _timeline(timeline: RoleTimeline) -> Callable[[], Picture] | None:
    """Return what draws the roles of all heads that ever changed; ``None`` if none did."""
    changed = {(change.layer, change.head): change.place for change in timeline.changes}
    if not changed:
        return None
    heads = sorted(changed, key=lambda head: (_position(timeline, head[0]), head[1]))
    found = [[_at(timeline, entry, head) for entry in timeline.entries] for head in heads]
    labels = np.array([[cell[0] for cell in row] for row in found])
    sure = np.array([[cell[1] for cell in row] for row in found])
    names = [f"{changed[head]} head {head[1]}" for head in heads]
    epochs = [entry["epoch"] for entry in timeline.entries]
    return lambda: role_timeline(labels, ROLE_LABELS, heads=names, epochs=epochs, sure=sure, title="roles over time")


def append_roles(path: Path, epoch: int, step: int, result: HeadRolesResult, drift: Tensor) -> None:
    """Append a row a head to a CSV file; after its label the strength of every role."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow((*_COLUMNS, *(f"strength_{name}" for name in ROLES)))
        writer.writerows((epoch, step, *row) for row in _rows(result, drift))


def _rows(result: HeadRolesResult, drift: Tensor) -> Iterator[tuple[str | int | float, ...]]:
    labels, names = result.labels(), result.names()
    won = labels.label.clamp(0, len(ROLES) - 1)[..., None]
    error = result.strength_error.gather(-1, won)[..., 0].where(~labels.strength.isnan(), torch.nan)
    columns = torch.stack([labels.strength, error, labels.confidence, result.agreement(), drift], dim=-1)
    for layer, head in (labels.label >= 0).nonzero().tolist():
        values = [*columns[layer, head].tolist(), *result.strength[layer, head].tolist()]
        cells = ("" if value != value else value for value in values)
        yield result.layer_names[layer], head, names[layer][head], *cells


def _position(timeline: RoleTimeline, layer: str) -> int:
    names = timeline.entries[-1]["layer_names"]
    return names.index(layer) if layer in names else len(names)


def _at(timeline: RoleTimeline, entry: dict[str, Any], head: tuple[str, int]) -> tuple[int, bool]:
    """Return label and sureness of a head in one entry."""
    names = entry["layer_names"]
    if head[0] not in names or head[1] >= len(entry["labels"][names.index(head[0])]):
        return -1, False
    row = names.index(head[0])
    label = entry["labels"][row][head[1]]
    return ROLE_LABELS.index(label) if label else -1, timeline.sure(entry["confidence"][row][head[1]])


def _listed(lines: Sequence[str]) -> str:
    more = [f"{len(lines) - _MOST_LINES} more"] if len(lines) > _MOST_LINES else []
    return "\n".join(f"- {line}" for line in [*lines[:_MOST_LINES], *more])
