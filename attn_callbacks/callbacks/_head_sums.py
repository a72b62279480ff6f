"""Head statistics of a run: added up by the name of the layer, then over processes in one collective and one copy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from attn_callbacks.callbacks._processes import are_connected, from_all_processes
from attn_callbacks.metrics import HeadStatisticsMetric, HeadStatisticsResult

__all__ = ["HeadSums"]

_NOTHING = (0, 0)


class HeadSums:
    """Add up the statistics of layers as they come, and conclude after each validation.

    The first conclusion of a run agrees on layers and sizes between processes. From then on a conclusion is one
    collective, in which each process also says whether it saw a layer or head that is new, so that all of them agree
    anew, or none. A process whose share of the data was empty takes part like any other.

    Args:
        processes: How many processes the run has.
    """

    def __init__(self, processes: int = 1) -> None:
        self._is_distributed = are_connected(processes)
        self._layers: dict[str, int] = {}
        self._metric: HeadStatisticsMetric | None = None
        self._agreed: tuple[int, int] | None = None  # numbers of layers and heads

    def add(self, layer: str, statistics: Tensor, weight: Tensor) -> None:
        """Add ``(batch, heads, statistics)`` of a layer, weighted by ``(batch,)``."""
        number = self._layers.setdefault(layer, len(self._layers))
        size = len(self._layers), statistics.shape[1]
        if self._metric is None or size[0] > self._metric.layers or size[1] > self._metric.heads:
            self._resize(*size, statistics.device)
        metric: Any = self._metric
        metric.update(number, statistics, weight)

    def conclude(self, device: torch.device, *, failed: bool) -> tuple[tuple[str, ...], HeadStatisticsResult] | None:
        """Return the layers and their statistics over all processes, and start anew. Every process must call it.

        Args:
            device: Where this process computes.
            failed: This process could not measure all of its data.

        Returns:
            The same on all processes, on the CPU; ``None`` if none saw anything.

        Raises:
            RuntimeError: On all processes, if one of them failed: half a result would be taken for a whole one.
        """
        if not self._is_distributed:
            self._agreed = self._size()
        elif self._agreed is None:
            self._agree(device)
        total = self._sum(device, failed)
        if total[0]:
            self._agree(device)
            total = self._sum(device, failed)
        if self._metric is not None:
            self._metric.reset()
        if total[1]:
            raise RuntimeError("A process could not measure all of its data.")
        if not self._layers:
            return None
        mean, error, median, samples = total[2:].view(4, *self._size(), -1).unbind()
        return tuple(self._layers), HeadStatisticsResult(mean, error, median, samples.long())

    def _sum(self, device: torch.device, failed: bool) -> Tensor:
        """Return on the CPU: how many processes saw something new, how many failed, and unless one did, the result."""
        is_new, metric = self._size() != self._agreed, self._metric
        if is_new:  # nobody reads the sum of this round: it only has to be as long as the others expect
            metric = HeadStatisticsMetric(*self._agreed).to(device) if self._agreed and any(self._agreed) else None
        flags = torch.tensor([is_new, failed], dtype=torch.float64, device=device)
        if not self._is_distributed:
            return (flags if metric is None else torch.cat([flags, metric.compute_packed().flatten()])).cpu()
        processes = dist.get_world_size()
        total = flags if metric is None else torch.cat([flags, metric.packed(dist.get_rank(), processes)])
        dist.all_reduce(total)
        if metric is not None:
            total = torch.cat([total[:2], metric.compute_packed(total[2:], processes).flatten()])
        return total.cpu()

    def _agree(self, device: torch.device) -> None:
        """Take over the layers of all processes, in the order of the processes, and the largest number of heads."""
        own = list(self._layers), self._size()[1]
        shares = from_all_processes(own, is_distributed=self._is_distributed)
        layers = dict.fromkeys(layer for names, _ in shares for layer in names)
        held, self._layers = self._layers, {name: number for number, name in enumerate(layers)}
        heads = max(heads for _, heads in shares)
        if layers:
            self._resize(len(layers), heads, device, held)
        self._agreed = self._size()

    def _size(self) -> tuple[int, int]:
        return (len(self._layers), self._metric.heads) if self._metric else _NOTHING

    def _resize(self, layers: int, heads: int, device: torch.device, held: dict[str, int] | None = None) -> None:
        """Make room for layers and heads, and move what is ``held`` to its layers' present numbers."""
        old = self._metric
        new = HeadStatisticsMetric(layers, max(heads, old.heads) if old else heads).to(device)
        if old is not None:
            for name, number in (held or self._layers).items():
                if number < old.layers:
                    for state in ("moments", "histogram", "highest"):
                        new.writable(state)[self._layers[name], : old.heads] = getattr(old, state)[number]
        self._metric = new
