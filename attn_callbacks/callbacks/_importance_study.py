"""What HeadImportance finds out in one validation, within its time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from attn_callbacks._plain import plain
from attn_callbacks.analysis.ablation import HeadAblation, ablate_heads
from attn_callbacks.analysis.head_importance import GateImportance, head_importance
from attn_callbacks.analysis.interaction import HeadInteractions, head_interactions
from attn_callbacks.analysis.pruning import PruningCurve, pruning_curve

__all__ = ["HeadStudy", "Method", "study"]

Method = Literal["gate", "ablation"]

_STEPS = 10  # of the pruning curve
_AT_LEAST = 1e-3  # seconds: each part does at least what it has begun


@dataclass(frozen=True, eq=False)
class HeadStudy:
    """What `HeadImportance` found in one validation.

    Args:
        epoch: Epoch of training.
        importance: With the method ``"gate"``.
        ablation: With the method ``"ablation"``.
        pruning: The loss without ever more heads; ``None`` if there was no time for it.
        interactions: If they were asked for; ``None`` if there was no time for them.
        seconds: Time it took.
        unfinished: What was not measured, or not whole, when the time was up: of ``"importance"``, ``"pruning"`` and
            ``"pairs"``.
    """

    epoch: int
    importance: GateImportance | None
    ablation: HeadAblation | None
    pruning: PruningCurve | None
    interactions: HeadInteractions | None
    seconds: float
    unfinished: tuple[str, ...] = ()

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Name of each layer."""
        found = self.importance or self.ablation
        return () if found is None else found.layer_names

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, lists and strings; NaN becomes ``None``."""
        parts = ("importance", "ablation", "pruning", "interactions")
        found = {name: getattr(self, name) for name in parts}
        own = {name: None if part is None else part.to_dict() for name, part in found.items()}
        return {"epoch": self.epoch, "seconds": plain(self.seconds), "unfinished": list(self.unfinished), **own}


def study(
    model: nn.Module,
    batches: Sequence[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    layers: Sequence[str] | None,
    *,
    method: Method,
    interactions: bool,
    seconds: float,
    epoch: int,
) -> HeadStudy:
    """Measure importance, then follow a pruning curve, then interactions, as far as the time goes."""
    begun = time.monotonic()

    def left() -> float:
        return begun + seconds - time.monotonic()

    importance = ablation = curve = pairs = None
    if method == "gate":
        importance = head_importance(model, batches, loss, layers, seconds=max(left(), _AT_LEAST))
        values = importance.importance
    else:
        ablation = ablate_heads(model, batches, loss, layers=layers, seconds=max(left(), _AT_LEAST))
        values = ablation.change
    if left() > 0:
        step = -(-int((~values.isnan()).sum()) // _STEPS)
        curve = pruning_curve(model, batches, loss, values, max(step, 1), layers, seconds=max(left(), _AT_LEAST))
    if interactions and left() > 0:
        pairs = head_interactions(model, batches, loss, layers=layers, seconds=max(left(), _AT_LEAST))
    asked = {"importance": importance or ablation, "pruning": curve, **({"pairs": pairs} if interactions else {})}
    unfinished = tuple(name for name, part in asked.items() if part is None or not part.is_complete)
    return HeadStudy(epoch, importance, ablation, curve, pairs, time.monotonic() - begun, unfinished)
