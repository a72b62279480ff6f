"""What all our metrics share: fixed-size states that are added to in place."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["Accumulator"]


class Accumulator(Metric):
    """Metric whose states may be updated inside and outside ``torch.inference_mode``, in any order.

    Lightning validates in inference mode. A state that was reset or synchronised there is an inference tensor, which
    nothing outside may add to in place.
    """

    is_differentiable = False
    full_state_update = False

    def add_zeros(self, name: str, *shape: int, dtype: torch.dtype = torch.float64) -> None:
        """Declare the state ``name``: zeros that are summed across processes."""
        with torch.inference_mode(False):
            self.add_state(name, torch.zeros(*shape, dtype=dtype, device=self.device), dist_reduce_fx="sum")

    def writable(self, name: str) -> Tensor:
        """Return the state ``name``, ready for an addition in place."""
        state: Tensor = getattr(self, name)
        if state.is_inference() and not torch.is_inference_mode_enabled():
            state = state.clone()
            setattr(self, name, state)
        return state
