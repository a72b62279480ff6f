"""One training run, the same for every method: a module, a trainer that keeps nothing, one thread."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from benchmarks.debias.work import Samples, Work

__all__ = ["Classifier", "fit", "predict", "steps_of"]

Batch = dict[str, Tensor]


class Classifier(pl.LightningModule):
    """A model with its criterion; methods subclass it where a step is another one.

    Attributes:
        group_part: Part of a batch that the criterion takes as groups: ``"cell"`` (class in group) or ``"group"``.

    Args:
        work: Says what the optimiser is.
        model: The network.
        criterion: Called with logits and labels, and with ``group=`` and ``sample_weight=`` where it takes them and the
            batch has them.
        steps: Length of the run, for a learning rate that falls.
    """

    group_part = "cell"

    def __init__(self, work: Work, model: nn.Module, criterion: nn.Module, steps: int) -> None:
        super().__init__()
        self.work, self.model, self.criterion, self.steps = work, model, criterion, steps
        known = inspect.signature(criterion.forward).parameters
        self.extras = [name for name in ("group", "sample_weight") if name in known]

    def forward(self, batch: Batch) -> Tensor:
        """Return logits."""
        logits: Tensor = self.model(batch)
        return logits

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the criterion's value."""
        keys = {"group": self.group_part, "sample_weight": "sample_weight"}
        extras = {name: batch[keys[name]] for name in self.extras if keys[name] in batch}
        value: Tensor = self.criterion(logits, batch["labels"], **extras)
        return value

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss."""
        return self.loss(self(batch), batch)

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Return logits: the bias monitor reads them."""
        return {"logits": self(batch)}

    def configure_optimizers(self) -> Any:
        """AdamW, at the learning rate of the work."""
        work = self.work
        wanted = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(wanted, lr=work.learning_rate, weight_decay=work.weight_decay)
        if not work.cosine:
            return optimizer
        warm_up = max(1, self.steps // 20)
        parts = [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warm_up, total_iters=warm_up),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, self.steps - warm_up)),
        ]
        schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, parts, milestones=[warm_up])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(
    work: Work,
    module: Classifier,
    train: Samples,
    monitor: Samples,
    *,
    callbacks: Sequence[Callback] = (),
    sampler: Sampler[int] | None = None,
) -> None:
    """Train a module for as many steps as it was made for, with validation on the monitor's samples at each epoch.

    Args:
        work: Says how large a batch is.
        module: What to train.
        train: Training samples.
        monitor: Validation samples.
        callbacks: Of the method; without any, validation is left out.
        sampler: Draws the training samples; ``None`` takes each once an epoch.
    """
    loader = _loader(train, work.batch_size, sampler)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few workers, no logger: all of it is on purpose
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=-1,
            max_steps=module.steps,
            callbacks=list(callbacks),
            limit_val_batches=1.0 if callbacks else 0,
            val_check_interval=1 / work.checks,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, loader, DataLoader(monitor, 256, collate_fn=_as_it_is))
    module.eval()


def steps_of(work: Work, samples: int) -> int:
    """Return how many steps the budget of a work has."""
    return work.epochs * -(-samples // work.batch_size)


@torch.no_grad()
def predict(module: nn.Module, samples: Samples) -> Tensor:
    """Return logits of all samples, ``(samples, classes)``."""
    rows = torch.arange(len(samples)).split(256)
    return torch.cat([module(samples.rows(own).parts) for own in rows])


def _loader(samples: Samples, batch_size: int, sampler: Sampler[int] | None) -> DataLoader[Any]:
    return DataLoader(samples, batch_size, shuffle=sampler is None, sampler=sampler, collate_fn=_as_it_is)


def _as_it_is(batch: Any) -> Any:
    return batch
