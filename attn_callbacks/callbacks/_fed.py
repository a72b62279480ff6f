"""Count what training was fed: how many samples of each group and class reached the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attn_callbacks.batch import BatchSchema

if TYPE_CHECKING:
    from pytorch_lightning.strategies import Strategy

__all__ = ["MOST_CLASSES", "MOST_GROUPS", "FedCounts"]

MOST_GROUPS = 64
"""Room for groups when nobody gave their number; asking the data for it would wait for the device at each batch."""
MOST_CLASSES = 1024


class FedCounts:
    """Samples of each group and class; of all processes until the last :meth:`gather`, of this one since."""

    def __init__(self) -> None:
        self._gathered = torch.zeros(MOST_GROUPS, MOST_CLASSES, dtype=torch.int64)
        self._since: Tensor | None = None
        self._groups_unknown = False

    def add(self, schema: BatchSchema, batch: Any) -> None:
        """Count the labels and groups of a training batch; labels that are no classes are not counted.

        Raises:
            ValueError: If there are groups that are not one index a sample.
        """
        target, group = _read(schema, "target", batch), _read(schema, "group", batch)
        if not isinstance(target, Tensor) or target.ndim != 1 or target.is_floating_point():
            return
        if self._since is None:
            self._since = torch.zeros_like(self._gathered, device=target.device)
        self._groups_unknown = group is None
        group = torch.zeros_like(target) if group is None else _indices(group, target)
        known = (target >= 0) & (target < MOST_CLASSES) & (group >= 0) & (group < MOST_GROUPS)
        index = (group * MOST_CLASSES + target).where(known, 0)
        self._since.view(-1).scatter_add_(0, index, known.long())

    def gather(self, strategy: Strategy) -> None:
        """Add up all processes. Every process must call it."""
        since = torch.zeros_like(self._gathered) if self._since is None else self._since
        self._gathered += strategy.reduce(since.to(strategy.root_device), reduce_op="sum").cpu()
        self._since = None

    def counts(self, groups: int, classes: int) -> Tensor | None:
        """Return ``(groups, classes)``; ``None`` if that was not counted: before training, or without known groups."""
        total = self._total()
        unknown = classes > MOST_CLASSES or (groups > 1 and self._groups_unknown)
        return None if unknown or not total.any() else total[:groups, :classes]

    def state(self) -> Tensor:
        """Return the counts as small as they are, for a checkpoint."""
        total = self._total()
        used = total.nonzero()
        rows, columns = (used.amax(dim=0) + 1).tolist() if len(used) else (0, 0)
        return total[:rows, :columns].clone()

    def load(self, state: Tensor) -> None:
        """Continue from :meth:`state`."""
        self._gathered.zero_()
        self._since = None
        self._gathered[: state.shape[0], : state.shape[1]] = state

    def _total(self) -> Tensor:
        return self._gathered if self._since is None else self._gathered + self._since.cpu()


def _indices(group: Any, target: Tensor) -> Tensor:
    if not isinstance(group, Tensor) or group.shape != target.shape or group.is_floating_point():
        came = f"{group.dtype} {tuple(group.shape)}" if isinstance(group, Tensor) else repr(group)[:80]
        raise ValueError(f"`group` must hold one group index a sample, integers {tuple(target.shape)}, got {came}.")
    return group.to(target.device)


def _read(schema: BatchSchema, field: str, batch: Any) -> Any:
    try:
        return schema.read(field, batch)
    except KeyError:
        return None  # many know the groups of validation data only
