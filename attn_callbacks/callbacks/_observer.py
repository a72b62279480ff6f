"""What callbacks that only look have in common: they listen to validation steps and never change training."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from attn_callbacks._checks import at_least
from attn_callbacks._lightning import Callback, rank_zero_warn
from attn_callbacks.batch import BatchSchema
from attn_callbacks.callbacks._arguments import ArgumentsOnly
from attn_callbacks.callbacks._loggers import can_log
from attn_callbacks.callbacks._steps import StepTap, tap_step

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["ValidationObserver"]


class ValidationObserver(ArgumentsOnly, Callback):
    """Listens to ``validation_step``; inert, after one warning, where no logger keeps what it finds.

    Args:
        schema: Where a batch has what.
        every_n_epochs: Look after every n-th epoch.
    """

    def __init__(self, schema: BatchSchema | None, every_n_epochs: int) -> None:
        self.schema = schema or BatchSchema()
        self.every_n_epochs = at_least("every_n_epochs", every_n_epochs, 1)
        self._remove: Callable[[], None] | None = None
        self._due = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listen to ``validation_step``."""
        self._detach()  # one instance may serve two runs
        if stage not in ("fit", "validate"):
            return
        if can_log(trainer):
            self._start(trainer, pl_module)
            self._remove = tap_step(pl_module, "validation_step", StepTap(context=self._around))
        elif not getattr(trainer, "fast_dev_run", False):
            rank_zero_warn(f"`{type(self).__name__}` has no logger to write to and stays inert.")

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decide whether this validation is looked at."""
        due = not trainer.sanity_checking and (trainer.current_epoch + 1) % self.every_n_epochs == 0
        self._due = due and self._remove is not None
        if self._due:
            self._begin(trainer)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what was found."""
        if self._due:
            self._finish(trainer)
        self._due = False

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop listening."""
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop listening; ``teardown`` does not run after an exception."""
        self._detach()

    def _detach(self) -> None:
        if self._remove is not None:
            self._remove()
        self._remove, self._due = None, False

    @abstractmethod
    def _start(self, trainer: Trainer, module: LightningModule) -> None:
        """Prepare for a run."""

    @abstractmethod
    def _begin(self, trainer: Trainer) -> None:
        """Prepare for a validation."""

    @abstractmethod
    def _around(self, batch: Any) -> AbstractContextManager[Any]:
        """Watch one validation step."""

    @abstractmethod
    def _finish(self, trainer: Trainer) -> None:
        """Reduce over processes and log; called on each of them."""
