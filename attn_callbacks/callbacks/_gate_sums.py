"""Gate gradients of a run, added up by the name of the layer; over processes in one exchange."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_callbacks.callbacks._host import to_host
from attn_callbacks.callbacks._processes import are_connected, from_all_processes
from attn_callbacks.metrics.importance import MOMENTS, HeadImportanceMetric, HeadImportanceResult, importance_result

__all__ = ["GateSums"]


class GateSums:
    """Add up the gate gradients of layers as they come, and conclude now and then.

    Args:
        processes: How many processes the run has.
    """

    def __init__(self, processes: int = 1) -> None:
        self._is_distributed = are_connected(processes)
        self._layers: dict[str, HeadImportanceMetric] = {}

    def see(self, layer: str, heads: int, device: torch.device) -> None:
        """Make a layer known, also one that no gradient may reach."""
        if layer not in self._layers:
            self._layers[layer] = HeadImportanceMetric(1, heads).to(device)

    def add(self, layer: str, gates: Tensor) -> None:
        """Add ``(samples, heads)`` of a layer that is known."""
        self._layers[layer].update(0, gates)

    def conclude(
        self, device: torch.device, *, looked: bool, failed: bool
    ) -> tuple[tuple[str, ...], HeadImportanceResult] | None:
        """Return the layers and their importance over all processes, and start anew. Every process must call it.

        Args:
            device: Where this process computes.
            looked: This process listened to some step.
            failed: This process could not take in all that arrived.

        Returns:
            The same on all processes, on the CPU; ``None`` if none had anything to look at.

        Raises:
            RuntimeError: On all processes, if one of them failed: the others would go on listening for nothing.
        """
        own = to_host([metric.moments[0].to(device) for metric in self._layers.values()])
        for metric in self._layers.values():
            metric.reset()
        shares = from_all_processes(
            (looked, failed, dict(zip(self._layers, own, strict=True))), is_distributed=self._is_distributed
        )
        if any(failed for _, failed, _ in shares):
            raise RuntimeError("A process could not take in all of its gradients.")
        layers = dict.fromkeys(layer for *_, held in shares for layer in held)
        if not any(looked for looked, *_ in shares) or not layers:
            return None
        heads = max(len(moments) for *_, held in shares for moments in held.values())
        total = torch.zeros(len(layers), heads, MOMENTS, dtype=torch.float64)
        for row, layer in zip(total, layers, strict=True):
            for *_, held in shares:
                if layer in held:
                    row += F.pad(held[layer], (0, 0, 0, heads - len(held[layer])))
        return tuple(layers), importance_result(total)
