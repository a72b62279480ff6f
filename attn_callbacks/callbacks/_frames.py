"""Colours of the frames around attention maps: one a head, or one a cluster that `HeadRoles` found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from attn_callbacks._lightning import MisconfigurationException
from attn_callbacks.callbacks.head_roles import HeadRoles
from attn_callbacks.render import cluster_colours, head_colours

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = ["FRAMES", "Frames", "check_frames", "frame_colours"]

Frames = Literal["head", "cluster"]
FRAMES: tuple[Frames, ...] = ("head", "cluster")


def check_frames(frames: Frames, trainer: Trainer, name: str) -> None:
    """Refuse frames by cluster where nobody looks for clusters."""
    if frames == "cluster" and _clustering(trainer) is None:
        raise MisconfigurationException(
            f"`{name}(frames='cluster')` takes clusters from `HeadRoles`, which is not among the callbacks, or has "
            "`clusters=False` or `drift_samples=0`. Add `HeadRoles()` before it."
        )


def frame_colours(frames: Frames, trainer: Trainer, heads: Sequence[tuple[str, int]]) -> NDArray[np.uint8]:
    """Return the colour of each head's frame, ``(heads, 3)``; grey for heads whose cluster is not known (yet).

    Args:
        frames: What a colour stands for.
        trainer: Knows the callback that looks for clusters; those of its last look are taken.
        heads: Layer name and number of each head.
    """
    if frames == "head":
        numbers = [head for _, head in heads]
        return head_colours(max(numbers) + 1).take(numbers, axis=0)
    roles = _clustering(trainer)
    found = None if roles is None else roles.head_clusters
    if found is None:
        return cluster_colours(np.full(len(heads), -1))
    layers = {name: row.tolist() for name, row in zip(found.layer_names, found.labels, strict=True)}
    labels = [layer[head] if head < len(layer := layers.get(name, [])) else -1 for name, head in heads]
    return cluster_colours(np.array(labels))


def _clustering(trainer: Trainer) -> HeadRoles | None:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return next((c for c in callbacks if isinstance(c, HeadRoles) and c.clusters and c.drift_samples), None)
