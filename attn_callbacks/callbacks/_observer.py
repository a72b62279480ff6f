"""What all callbacks here have in common: they look at validation steps, and looking never changes or ends a run."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attn_callbacks._checks import at_least
from attn_callbacks._lightning import Callback, rank_zero_warn
from attn_callbacks.batch import BatchSchema
from attn_callbacks.callbacks._arguments import ArgumentsOnly
from attn_callbacks.callbacks._guard import Guard
from attn_callbacks.callbacks._loggers import can_log, run_folder
from attn_callbacks.callbacks._steps import StepTap, tap_step
from attn_callbacks.callbacks._validation_loader import loader_index
from attn_callbacks.callbacks._writer import BackgroundWriter

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["ValidationObserver"]


class ValidationObserver(ArgumentsOnly, Callback):
    """Looks at the steps of one validation loader; inert, after one warning, where no logger keeps what it finds.

    Args:
        schema: Where a batch has what.
        every_n_epochs: Look after every n-th epoch of training.
        every_n_batches: Look at every n-th batch.
        dataloader: Validation loader to look at, by its index or, where loaders are a dict, by its name.
    """

    _needs_logger = True

    def __init__(
        self,
        schema: BatchSchema | None,
        every_n_epochs: int = 1,
        every_n_batches: int = 1,
        dataloader: int | str = 0,
    ) -> None:
        if schema is not None and not isinstance(schema, BatchSchema):
            raise TypeError(f"`schema` must be a `BatchSchema`, got {schema!r}. Write BatchSchema(...).")
        self.schema = schema or BatchSchema()
        self.every_n_epochs = at_least("every_n_epochs", every_n_epochs, 1)
        self.every_n_batches = at_least("every_n_batches", every_n_batches, 1)
        self.dataloader = dataloader if isinstance(dataloader, str) else at_least("dataloader", dataloader, 0)
        self._loader_index = 0
        self._removes: list[Callable[[], None]] = []
        self._fitting = self._due = self._looking = False
        self._guard = Guard(f"`{type(self).__name__}`")
        self._writer = BackgroundWriter(self._guard)
        self._folder: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listen to ``validation_step``."""
        self._detach()  # one instance may serve two runs
        if stage in ("fit", "validate") and self._has_logger(trainer):
            self._attach(trainer, pl_module, fitting=stage == "fit")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if there will be nothing to look at."""
        if self._removes and not trainer.enable_validation:
            rank_zero_warn(f"`{type(self).__name__}` looks at validation, of which this run has none, and stays inert.")

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decide whether this validation is looked at."""
        self._due = bool(self._removes) and self._is_due(trainer)
        if self._due:
            self._loader_index = loader_index(trainer, self.dataloader)
        if self._due:
            self._begin(trainer)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Decide whether this batch is looked at."""
        self._looking = self._due and dataloader_idx == self._loader_index and batch_idx % self.every_n_batches == 0

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take in what the step returned."""
        if self._looking and not self._guard.off:
            self._add(outputs, batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Conclude and log."""
        if self._due:
            self._finish(trainer, pl_module)
        self._due = self._looking = False

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop listening, and finish what is being drawn before the loggers close."""
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Do the same; ``teardown`` does not run after an exception."""
        self._detach()

    def _has_logger(self, trainer: Trainer) -> bool:
        if not self._needs_logger or can_log(trainer):
            return True
        if not getattr(trainer, "fast_dev_run", False):
            rank_zero_warn(f"`{type(self).__name__}` has no logger to write to and stays inert.")
        return False

    def _attach(self, trainer: Trainer, module: LightningModule, *, fitting: bool) -> None:
        self._fitting, self._guard.off = fitting, False
        self._folder = run_folder(trainer)  # communicates: once a run
        self._start(trainer, module)
        self._removes.append(tap_step(module, "validation_step", StepTap(context=self._around)))

    def _detach(self) -> None:
        """Give everything back; a second time is harmless."""
        for remove in self._removes:
            remove()
        self._removes = []
        self._due = self._looking = False
        self._writer.close()

    def _batches(self, trainer: Trainer) -> float:
        """Return the number of batches that this validation has of the loader; infinite where nobody knows."""
        counts = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        return float(counts[self._loader_index])

    def _is_due(self, trainer: Trainer) -> bool:
        due = not self._fitting or (trainer.current_epoch + 1) % self.every_n_epochs == 0
        return due and not trainer.sanity_checking

    def _around(self, batch: Any) -> AbstractContextManager[Any]:
        if self._looking and not self._guard.off:
            with self._guarded():
                return self._watch(batch)
        return nullcontext()

    def _guarded(self) -> AbstractContextManager[None]:
        """Return what is entered around everything that may go wrong."""
        return self._guard.block()

    def _add(self, outputs: Any, batch: Any) -> None:
        """Take in what a step returned."""
        del outputs, batch

    @abstractmethod
    def _start(self, trainer: Trainer, module: LightningModule) -> None:
        """Prepare for a run."""

    @abstractmethod
    def _begin(self, trainer: Trainer) -> None:
        """Prepare for a validation."""

    @abstractmethod
    def _watch(self, batch: Any) -> AbstractContextManager[Any]:
        """Return what is to be entered around one validation step."""

    @abstractmethod
    def _finish(self, trainer: Trainer, module: LightningModule) -> None:
        """Reduce over processes and log; called on each of them, also where the guard is off."""
