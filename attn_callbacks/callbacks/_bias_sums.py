"""What a bias monitor counts, by name, and the same over all processes in two collectives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from attn_callbacks.metrics import (
    ClassAttention,
    ClassMass,
    GroupCalibration,
    GroupConfusion,
    RelianceCounts,
    TokenAssociation,
)
from attn_callbacks.metrics.accumulator import Accumulator

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = ["BiasSums", "Sizes"]


class Sizes(NamedTuple):
    """How large the counts are.

    Args:
        classes: Number of classes.
        groups: Number of groups.
        tokens: Number of token ids, or of places.
    """

    classes: int = 0
    groups: int = 0
    tokens: int = 0


_METRICS: Mapping[str, Callable[[Sizes], Accumulator]] = {
    "confusion": lambda sizes: GroupConfusion(sizes.classes, sizes.groups),
    "calibration": lambda sizes: GroupCalibration(sizes.classes, sizes.groups),
    "attention": lambda sizes: ClassAttention(sizes.classes),
    "association": lambda sizes: TokenAssociation(sizes.tokens, sizes.classes),
    "mass": lambda sizes: ClassMass(sizes.classes),
    "reliance": lambda sizes: RelianceCounts(sizes.classes),
}


class BiasSums:
    """Metrics by name, ``"confusion"`` or ``"mass/spurious"``, made when they are first needed.

    Args:
        names: All names there may be, in an order that all processes share.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.sizes = Sizes()
        self._names = names
        self._metrics: dict[str, Accumulator] = {}

    def metric(self, name: str, device: torch.device) -> Any:
        """Return the metric of a name, empty at first."""
        if name not in self._metrics:
            self._metrics[name] = self._fresh(name, self.sizes).to(device)
        return self._metrics[name]

    def gathered(self, trainer: Trainer, *, failed: bool, broken: int) -> tuple[Sizes, dict[str, Any], int] | None:
        """Add up over processes; each of them must call it.

        Args:
            trainer: Knows the processes.
            failed: This process could not count all of its batches.
            broken: Samples that this process left out.

        Returns:
            Sizes, metrics that hold the sums of all processes, and the samples left out by all; ``None`` if a process
            failed or none counted anything.
        """
        strategy = trainer.strategy
        device = strategy.root_device
        held = [int(name in self._metrics) for name in self._names]
        flags = torch.tensor([int(failed), broken > 0, *self.sizes, *held], device=device)
        any_failed, any_broken, classes, groups, tokens, *seen = strategy.reduce(flags, reduce_op="max").tolist()
        sizes = Sizes(classes, groups, tokens)
        if any_failed:
            return None
        names = [name for name, found in zip(self._names, seen, strict=True) if found]
        own = [self._sized(name, sizes).to(device) for name in names]
        process, processes = trainer.global_rank, trainer.world_size
        count = torch.tensor([float(broken)], dtype=torch.float64, device=device)
        total = strategy.reduce(torch.cat([count, *(m.packed(process, processes) for m in own)]), reduce_op="sum")
        all_broken, total = int(total[0]) if any_broken else 0, total[1:]
        merged = {}
        for name, metric in zip(names, own, strict=True):
            part, total = total.tensor_split([len(metric.packed(process, processes))])
            merged[name] = metric.merged(part, processes)
        return (sizes, merged, all_broken) if classes else None

    def _sized(self, name: str, sizes: Sizes) -> Accumulator:
        """Return the metric of a name, as large as the largest of all processes."""
        metric = self._metrics.get(name)
        if metric is None:
            return self._fresh(name, sizes)
        if isinstance(metric, TokenAssociation):
            metric.grow(sizes.tokens)
        return metric

    def _fresh(self, name: str, sizes: Sizes) -> Accumulator:
        return _METRICS[name.partition("/")[0]](sizes)
