"""Runs of a Trainer over a workload: a fit that times its steps, and a validation."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor

from attn_callbacks import AttentionHeatmaps, BiasMonitor, HeadStatistics
from benchmarks.fine_tuning import Workload, fine_tuning, random_fine_tuning

__all__ = ["OBSERVERS", "Fit", "fine_tuning", "fit", "observers", "random_fine_tuning", "validation"]

OBSERVERS = (HeadStatistics, AttentionHeatmaps, BiasMonitor)

Array = np.ndarray[Any, Any]

for _name in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric"):
    logging.getLogger(_name).setLevel(logging.ERROR)  # each run would say which devices there are


class Fit(NamedTuple):
    """What a fit left behind.

    Args:
        seconds: Time from the start of each training step to that of the next, everything between included.
        losses: Loss of each step.
        weights: All weights at the end, ``(weights,)``.
    """

    seconds: Array
    losses: Array
    weights: Tensor


class StepClock(pl.Callback):
    """Notes when each training step starts, and its loss."""

    def __init__(self) -> None:
        self.starts: list[float] = []
        self.losses: list[Tensor] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Read the clock."""
        self.starts.append(time.perf_counter())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the loss."""
        self.losses.append(outputs["loss"].detach().clone())


def observers() -> list[pl.Callback]:
    """Return all observers as they come."""
    return [observer() for observer in OBSERVERS]


def fit(workload: Workload, folder: str, callbacks: Sequence[pl.Callback], validation: int | None = None) -> Fit:
    """Train one epoch from the same weights and the same seed, and validate on the first rows."""
    pl.seed_everything(0, verbose=False)
    clock, module = StepClock(), workload.module()
    _trainer(folder, [clock, *callbacks]).fit(module, *workload.loaders(validation))
    weights = torch.cat([weight.detach().ravel() for weight in module.parameters()])
    return Fit(np.diff(clock.starts)[1:], torch.stack(clock.losses).numpy(), weights)


def validation(
    workload: Workload,
    folder: str,
    callbacks: Callable[[], Sequence[pl.Callback]],
    rows: int,
    by_returned_maps: bool = False,
) -> Callable[[], object]:
    """Return a function that validates on the first rows once."""
    module, loader = workload.module(by_returned_maps), workload.loaders(rows)[1]
    return lambda: _trainer(folder, callbacks()).validate(module, loader, verbose=False)


def _trainer(folder: str, callbacks: Sequence[pl.Callback]) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=1,
        callbacks=list(callbacks),
        logger=TensorBoardLogger(folder),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        accelerator="cpu",
    )
