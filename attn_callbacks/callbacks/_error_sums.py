"""Statistics of heads by outcome: added up by the name of the layer, then over processes in one sum."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from attn_callbacks.callbacks._processes import from_all_processes
from attn_callbacks.functional.effect_size import Moments
from attn_callbacks.metrics.outcome_statistics import OutcomeStatistics

__all__ = ["ErrorSums"]


class _Size(NamedTuple):
    heads: int
    statistics: int
    classes: int


class ErrorSums:
    """Add up layers as they come, and conclude after each validation.

    Args:
        is_distributed: Other processes see other samples.
    """

    def __init__(self, *, is_distributed: bool) -> None:
        self._is_distributed = is_distributed
        self._metrics: dict[str, OutcomeStatistics] = {}

    def add(self, layer: str, values: Tensor, target: Tensor, right: Tensor, classes: int) -> None:
        """Add ``(samples, heads, statistics)`` of a layer, by class and outcome of the samples ``(samples,)``."""
        if layer not in self._metrics:
            size = _Size(values.shape[1], values.shape[2], classes)
            self._metrics[layer] = OutcomeStatistics(1, *size).to(values.device)
        self._metrics[layer].update(0, values, target, right)

    def conclude(self, device: torch.device, *, failure: str | None) -> tuple[tuple[str, ...], Moments] | None:
        """Return the layers and the moments of all processes, and start anew. Every process must call it.

        Args:
            device: Where this process computes.
            failure: Why this process could not measure all of its data, if so.

        Returns:
            The same on all processes: moments ``(layers, heads, statistics, classes, 2)`` on the CPU; ``None`` if none
            saw anything.

        Raises:
            RuntimeError: On all processes, if one of them failed, or layers have other sizes on others: half a result
                would be taken for a whole one.
        """
        own, self._metrics = self._metrics, {}
        sizes = {name: _Size(each.heads, each.statistics, each.num_classes) for name, each in own.items()}
        shares: list[Any] = from_all_processes((failure, sizes), is_distributed=self._is_distributed)
        failures = [told for told, _ in shares if told is not None]
        if failures:
            raise RuntimeError(f"A process could not measure all of its data. {failures[0]}")
        layers = {name: size for _, found in shares for name, size in found.items()}
        if any(size != layers[name] for _, found in shares for name, size in found.items()):
            raise RuntimeError("Layers have other numbers of heads or classes on other processes.")
        if not layers:
            return None
        metrics = [own[name] if name in own else OutcomeStatistics(1, *size) for name, size in layers.items()]
        return tuple(layers), _joined(self._summed([metric.to(device) for metric in metrics]))

    def _summed(self, metrics: list[OutcomeStatistics]) -> list[Moments]:
        process, processes = (dist.get_rank(), dist.get_world_size()) if self._is_distributed else (0, 1)
        packed = [metric.packed(process, processes) for metric in metrics]
        total = torch.cat(packed)
        if self._is_distributed:
            dist.all_reduce(total)
        parts = total.cpu().split([len(part) for part in packed])
        merged: list[Any] = [m.cpu().merged(part, processes) for m, part in zip(metrics, parts, strict=True)]
        return [metric.compute().moments for metric in merged]


def _joined(layers: list[Moments]) -> Moments:
    """Stack layers; the heads that one lacks have no samples."""
    most = max(layer.samples.shape[1] for layer in layers)
    with torch.inference_mode(False):  # for whoever computes with it later
        fields = [
            torch.cat([F.pad(field, (0, 0) * 3 + (0, most - field.shape[1])).clone() for field in each])
            for each in zip(*layers, strict=True)
        ]
    return Moments(*fields)
