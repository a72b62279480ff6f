"""The history of roles: an entry for each validation that was looked at, and what changed for sure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from attn_callbacks._plain import plain
from attn_callbacks.metrics.roles import HeadRolesResult
from attn_callbacks.render.layers import short_layer_names

__all__ = ["RoleChange", "RoleTimeline"]

_PHRASES: Mapping[str, str] = {
    "class_gather": "a class-gathering head",
    "previous": "a previous-token head",
    "next": "a next-token head",
    "self": "a head on the token itself",
    "special": "a special-token head",
    "duplicate": "a duplicate-token head",
    "induction": "an induction head",
    "long_range": "a long-range head",
    "uniform": "a uniform head",
    "heterogeneous": "a head without a known role",
}


class RoleChange(NamedTuple):
    """One head that does something else than before.

    Args:
        epoch: Epoch after which that was first sure.
        step: Optimiser steps taken until then.
        layer: Name of the layer.
        place: The same, without what the names of all layers share.
        head: Number of the head.
        before: Its last label that was sure.
        after: Its label now.
        strength: Strength of that role, NaN for ``heterogeneous``.
        margin: How clear the label is.
    """

    epoch: int
    step: int
    layer: str
    place: str
    head: int
    before: str
    after: str
    strength: float
    margin: float

    def __str__(self) -> str:
        """Return the change as half a sentence."""
        strength = f"{self.strength:.2f}, " if self.strength == self.strength else ""
        role = _PHRASES.get(self.after, f"a {self.after} head")
        return f"{self.place} head {self.head} became {role} ({strength}was {self.before})"


class RoleTimeline:
    """Labels over time, in plain numbers and words, as a checkpoint keeps them.

    A change is told once both labels are sure: between ``sink`` and ``previous`` a head may be anything for a while.

    Args:
        margin: How clear a label has to be.
    """

    def __init__(self, margin: float) -> None:
        self.margin = margin
        self.entries: list[dict[str, Any]] = []
        self.changes: list[RoleChange] = []
        self._settled: dict[tuple[str, int], str] = {}

    def add(self, epoch: int, step: int, result: HeadRolesResult, drift: Tensor) -> list[RoleChange]:
        """Append what was measured, and return what changed by it.

        Args:
            epoch: Epoch of training.
            step: Optimiser steps taken.
            result: Roles.
            drift: Drift of each head, ``(layers, heads)``.
        """
        labels = result.labels()
        return self._append(
            {
                "epoch": epoch,
                "step": step,
                "layer_names": list(result.layer_names),
                "labels": result.names(),
                "strength": plain(labels.strength),
                "confidence": plain(labels.confidence),
                "drift": plain(drift),
            }
        )

    def unsure_changes(self) -> int:
        """Return how many heads have another label than at the look before, without it being sure."""
        if len(self.entries) < 2:
            return 0
        before, now = self.entries[-2:]
        labels = dict(zip(before["layer_names"], before["labels"], strict=True))
        rows = zip(now["layer_names"], now["labels"], now["confidence"], strict=True)
        known = [(labels[name], own, confidence) for name, own, confidence in rows if name in labels]
        return sum(
            bool(new) and new != old and not self.sure(margin)
            for olds, news, margins in known
            for old, new, margin in zip(olds, news, margins, strict=False)
        )

    def load(self, entries: list[dict[str, Any]]) -> None:
        """Take over the entries of an earlier run."""
        self.entries, self.changes, self._settled = [], [], {}
        for entry in entries:
            self._append(entry)

    def sure(self, confidence: float | None) -> bool:
        """Tell whether a label is clear enough to be told."""
        return confidence is not None and confidence >= self.margin

    def _append(self, entry: dict[str, Any]) -> list[RoleChange]:
        self.entries.append(entry)
        places = short_layer_names(entry["layer_names"])
        found = []
        for number, layer in enumerate(entry["layer_names"]):
            for head, label in enumerate(entry["labels"][number]):
                confidence, strength = entry["confidence"][number][head], entry["strength"][number][head]
                if not label or not self.sure(confidence):
                    continue
                before = self._settled.get((layer, head), label)
                self._settled[layer, head] = label
                if before != label:
                    value = float("nan") if strength is None else strength
                    own = layer, places[number], head, before, label, value, confidence
                    found.append(RoleChange(entry["epoch"], entry["step"], *own))
        self.changes += found
        return found
