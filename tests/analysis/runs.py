"""Every experiment by name, called alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attn_callbacks.analysis import (
    ablate_heads,
    head_importance,
    head_interactions,
    head_shapley,
    pruning_curve,
)

Run = Callable[..., Any]
ALL: dict[str, Run] = {
    "importance": head_importance,
    "ablation": ablate_heads,
    "means": lambda *args, **kwargs: ablate_heads(*args, value="mean", **kwargs),
    "estimated": head_interactions,
    "exact": lambda *args, **kwargs: head_interactions(*args, pairs=[((0, 0), (0, 1))], **kwargs),
    "shapley": lambda *args, **kwargs: head_shapley(*args, permutations=4, **kwargs),
    "pruning": pruning_curve,
}
