"""Class weights of the members of an ensemble: each hard class becomes the concern of one member."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attn_callbacks.feedback.criterion import BUFFER

__all__ = ["MemberWeights"]


class MemberWeights:
    """Raises the weight of a class in the loss of one member, the next one for each further class.

    Args:
        growth: Factor of one step.
        limit: Largest factor.
    """

    def __init__(self, growth: float, limit: float) -> None:
        self.growth, self.limit = growth, limit
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._start: list[Tensor] = []
        self._raised: dict[int, tuple[int, float]] = {}  # by class: which table, and how much

    def start(self, losses: nn.Module) -> None:
        """Note the weights that training begins with, once."""
        if not self._start:
            self._start = [table.detach().cpu().clone() for table in _tables(losses)]

    @property
    def known(self) -> bool:
        """Some member has class weights."""
        return bool(self._start)

    def raise_class(self, label: int) -> tuple[int, float, float]:
        """Raise a class by one step; return the member's number among those with weights, the old and new factor."""
        table, old = self._raised.get(label, (len(self._raised) % len(self._start), 1.0))
        new = min(old * self.growth, self.limit)
        self._raised[label] = (table, new)
        return table, old, new

    @torch.no_grad()
    def write(self, losses: nn.Module, acting: bool) -> None:
        """Write the weights into the losses, in place; those that training began with while not ``acting``."""
        for number, (table, start) in enumerate(zip(_tables(losses), self._start, strict=True)):
            weight = start.clone()
            for label, (owner, factor) in self._raised.items():
                if acting and owner == number:
                    weight[label] *= factor
            table.copy_(weight)

    def state(self) -> dict[str, object]:
        """Return the state, for a checkpoint."""
        raised = [[label, table, factor] for label, (table, factor) in self._raised.items()]
        return {"start": [table.clone() for table in self._start], "raised": raised}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state`."""
        self._start = [table.clone() for table in state.get("start", ())]
        self._raised = {int(label): (int(table), float(factor)) for label, table, factor in state.get("raised", ())}


def _tables(losses: nn.Module) -> list[Tensor]:
    """Return the weights by class of the members that have any; never kept, since moving a loss replaces them."""
    found = [getattr(member, BUFFER, None) for member in getattr(losses, "members", ())]
    return [table for table in found if isinstance(table, Tensor) and table.dim() == 1]
