"""What all our metrics share: fixed-size states that are added to in place."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["Accumulator"]


class Accumulator(Metric):
    """Metric whose states may be updated inside and outside ``torch.inference_mode``, in any order.

    Lightning validates in inference mode. A state that was reset or synchronised there is an inference tensor, which
    nothing outside may add to in place.

    Synchronised by torchmetrics, each state costs several collectives. :meth:`packed` puts all of them into one vector
    whose plain sum over the processes holds every sum, minimum and maximum: one collective for everything.
    """

    is_differentiable = False
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self._extremes: dict[str, str] = {}

    def add_zeros(self, name: str, *shape: int, dtype: torch.dtype = torch.float64) -> None:
        """Declare the state ``name``: zeros that are summed across processes."""
        with torch.inference_mode(False):
            self.add_state(name, torch.zeros(*shape, dtype=dtype, device=self.device), dist_reduce_fx="sum")

    def add_state(self, name: str, default: Any, dist_reduce_fx: Any = None, persistent: bool = False) -> None:
        """Declare the state ``name``, which is the ``"sum"``, ``"min"`` or ``"max"`` over processes."""
        super().add_state(name, default, dist_reduce_fx, persistent)
        if dist_reduce_fx != "sum":
            self._extremes[name] = dist_reduce_fx

    def writable(self, name: str) -> Tensor:
        """Return the state ``name``, ready for an addition in place."""
        state: Tensor = getattr(self, name)
        if state.is_inference() and not torch.is_inference_mode_enabled():
            state = state.clone()
            setattr(self, name, state)
        return state

    def packed(self, process: int = 0, processes: int = 1) -> Tensor:
        """Return all states as one float64 vector, to be summed over ``processes``.

        Counts are exact up to 2 ** 53. A sum cannot take a maximum, so each process has a place of its own for it, zero
        in the vectors of the others.

        Args:
            process: Number of this process.
            processes: How many there are.
        """
        parts = []
        for name in self._defaults:
            own = getattr(self, name).detach().double().flatten()
            if name in self._extremes:
                places = own.new_zeros(processes, len(own))
                places[process] = own
                own = places.flatten()
            parts.append(own)
        return torch.cat(parts)

    def unpacked(self, total: Tensor, processes: int = 1) -> dict[str, Tensor]:
        """Return the states of all processes together, from the sum of their vectors; this metric keeps its own."""
        states = {}
        for name in self._defaults:
            own: Tensor = getattr(self, name)
            places = processes if name in self._extremes else 1
            part, total = total.tensor_split([places * own.numel()])
            each = part.view(places, *own.shape)
            states[name] = (each.amin(dim=0) if self._extremes.get(name) == "min" else each.amax(dim=0)).to(own.dtype)
        return states

    def merged(self, total: Tensor, processes: int = 1) -> Accumulator:
        """Return a copy that holds the states of all processes, from the sum of their vectors; it never communicates.

        Args:
            total: Sum of the vectors that :meth:`packed` made.
            processes: How many there were.
        """
        twin = copy.deepcopy(self)
        twin.sync_on_compute = twin._to_sync = False
        twin._computed, twin._update_count = None, 1
        for name, state in self.unpacked(total, processes).items():
            setattr(twin, name, state)
        return twin
