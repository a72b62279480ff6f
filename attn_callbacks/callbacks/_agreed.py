"""Give values that all processes have agreed on to callbacks that monitor them; nothing is reduced again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchmetrics import Metric

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["log_agreed", "log_monitored"]

_FAR = 1e30
"""Worse than any value and finite, also in single precision with a `min_delta` added."""


class _Agreed(Metric):
    """A finished value. Lightning leaves the reduction of a metric to the metric, and this one has nothing to do."""

    full_state_update = False
    value: Tensor

    def __init__(self) -> None:
        super().__init__(sync_on_compute=False)
        self.add_state("value", torch.tensor(torch.nan), dist_reduce_fx=None)

    def update(self, value: float) -> None:
        self.value = torch.tensor(float(value))

    def compute(self) -> Tensor:
        return self.value


def log_agreed(module: LightningModule, name: str, value: float, *, logger: bool = False) -> None:
    """Log a value that is the same on all processes, so that callbacks can monitor it. Call it on every rank.

    Costs no communication and no copy from or to a device. A plain number would be reduced once more (a mean would also
    round it), or Lightning would warn that each process may have a value of its own.

    Args:
        module: The module that trains.
        name: What to monitor.
        value: The same on all processes.
        logger: Lightning writes it to the loggers too, in an event of its own and on an axis that it chooses, and
            ``trainer.validate`` returns it.
    """
    metric = _Agreed()
    metric.update(value)
    # the attribute is where Lightning would look the metric up; without one it searches the module, which has none
    # and where there is no logger, Lightning warns of an outright `True`
    module.log(name, metric, on_step=False, on_epoch=True, logger=None if logger else False, metric_attribute=name)


def log_monitored(trainer: Trainer, module: LightningModule, values: Mapping[str, float], *, logger: bool) -> None:
    """Log values of which some may not be known (NaN), so that no callback that monitors one ends the run.

    A name that is missing makes ``ModelCheckpoint`` and ``EarlyStopping`` raise. NaN is the last choice of the former,
    but makes the latter stop: where one listens, a finite value stands for it that is no better than any other.

    Args:
        trainer: Knows who monitors what.
        module: The module that trains.
        values: Names and values, the same on all processes.
        logger: As in :func:`log_agreed`.
    """
    for name, value in values.items():
        given = value if value == value else _unknown(trainer, name)
        log_agreed(module, name, given, logger=logger and abs(given) != _FAR)


def _unknown(trainer: Trainer, name: str) -> float:
    for stopping in trainer.early_stopping_callbacks:
        if stopping.monitor == name:
            limit = stopping.divergence_threshold  # beyond it the run would stop as well
            return float(limit) if limit is not None else _FAR if stopping.mode == "min" else -_FAR
    return torch.nan
