"""Log values that all processes have already agreed on: callbacks can monitor them, and nothing is reduced again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchmetrics import Metric

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule

__all__ = ["log_agreed"]


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


def log_agreed(module: LightningModule, name: str, value: float) -> None:
    """Log a value that is the same on all processes, so that callbacks can monitor it. Call it on every rank.

    Costs no communication and no copy from or to a device. A plain number would be reduced once more (a mean would also
    round it), or Lightning would warn that each process may have a value of its own.
    """
    metric = _Agreed()
    metric.update(value)
    # the attribute is where Lightning would look the metric up; without one it searches the module, which has none
    module.log(name, metric, on_step=False, on_epoch=True, metric_attribute=name)
