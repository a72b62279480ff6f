"""Alignment of a run's heads, added up by the name of the layer; over processes in one exchange."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_callbacks.callbacks._guard import message
from attn_callbacks.callbacks._host import to_host
from attn_callbacks.callbacks._processes import are_connected, from_all_processes
from attn_callbacks.functional.alignment_shape import ALIGNMENT_QUANTITIES
from attn_callbacks.metrics.alignment import MOMENTS, AlignmentMetric, AlignmentResult, alignment_result

__all__ = ["AlignmentSums"]


class AlignmentSums:
    """Add up alignments as they come, and conclude after each validation.

    Args:
        method: How links are read off.
        processes: How many processes the run has.
    """

    def __init__(self, method: str = "argmax", processes: int = 1) -> None:
        self._is_distributed = are_connected(processes)
        self._method = method
        self._layers: dict[str, AlignmentMetric] = {}

    def add(self, layer: str, weights: Tensor, **gold: Tensor | None) -> None:
        """Add a batch of a layer, as :class:`AlignmentMetric` takes it."""
        if layer not in self._layers:
            self._layers[layer] = AlignmentMetric(1, weights.shape[1], self._method).to(weights.device)
        self._layers[layer].update(0, weights, **gold)

    def conclude(self, device: torch.device, *, failure: str | None) -> AlignmentResult | None:
        """Return what all processes measured together, and start anew. Every process must call it.

        Args:
            device: Where this process computes.
            failure: Why this process could not measure all of its data, if so.

        Returns:
            The same on all processes, on the CPU; ``None`` if none saw a layer.

        Raises:
            RuntimeError: On all processes, if one of them failed: half a result would be taken for a whole one.
        """
        own: dict[str, Tensor] = {}
        try:
            own = self._taken(device)
        except Exception as error:  # noqa: BLE001  # the others wait for this process
            failure = failure or f"{type(error).__name__}: {message(error)}"
        told = from_all_processes((failure, own), is_distributed=self._is_distributed)
        for failed, _ in told:
            if failed is not None:
                raise RuntimeError(f"A process could not measure all of its data. {failed}")
        return _concluded([held for _, held in told])

    def _taken(self, device: torch.device) -> dict[str, Tensor]:
        """Return the sums of each layer on the host, and start anew."""
        try:
            own = to_host([metric.moments[0].to(device) for metric in self._layers.values()])
            return dict(zip(self._layers, own, strict=True))
        finally:
            for metric in self._layers.values():
                metric.reset()


def _concluded(shares: Sequence[Mapping[str, Tensor]]) -> AlignmentResult | None:
    """Add up what the processes hold, by the name of the layer."""
    layers = dict.fromkeys(layer for held in shares for layer in held)
    if not layers:
        return None
    heads = max(len(moments) for held in shares for moments in held.values())
    total = torch.zeros(len(layers), heads, len(ALIGNMENT_QUANTITIES), MOMENTS, dtype=torch.float64)
    for row, layer in zip(total, layers, strict=True):
        for held in shares:
            if layer in held:
                row += F.pad(held[layer], (0, 0, 0, 0, 0, heads - len(held[layer])))
    return alignment_result(total, tuple(layers))
