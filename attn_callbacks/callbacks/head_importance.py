"""HeadImportance: which heads the loss hangs on, which can go, and which pairs work together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from attn_callbacks._checks import at_least, check_number, name_list, one_of
from attn_callbacks._lightning import rank_zero_warn
from attn_callbacks.analysis._doubts import NoLossError
from attn_callbacks.batch import BatchSchema
from attn_callbacks.callbacks._bias_names import is_sharded
from attn_callbacks.callbacks._held_batches import HeldBatch, complaint, hold
from attn_callbacks.callbacks._importance_log import study_drawings, study_scalars, study_text
from attn_callbacks.callbacks._importance_study import HeadStudy, study
from attn_callbacks.callbacks._loggers import can_log, log_point, log_text, with_epoch
from attn_callbacks.callbacks._observer import ValidationObserver

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["HeadImportance"]


class HeadImportance(ValidationObserver):
    """Find out after a validation which heads the loss hangs on, on some of its batches.

    An observer: training is bit-identical with and without it. The network runs again on the first ``batches`` of the
    first validation loader, in evaluation and in the precision of the Trainer; no parameter gets a gradient.

    Logs layer x head pictures: ``importance/gate`` (size of the gate gradient), ``importance/first_order_change``
    (what it says of the loss without the head) and ``importance/confidence``, or ``importance/ablation`` (the loss
    without the head, measured); with ``interactions`` the matrix ``importance/interaction``. As text
    ``importance/summary``: the heads that can go together for a rise of the loss below ``rise``, with the rise that was
    measured, and the pairs that interact most. As numbers the mean of each layer, ``importance/loss``,
    ``importance/removable`` and ``importance/removable_change``. :attr:`result` keeps it all, also without a logger.

    ``HeadStatistics(importance_every_n_steps=...)`` measures gates on training batches, in steps that run anyway; this
    callback asks more, and on data that the model does not learn from.

    On several processes the first one does it, on its own batches, while the others wait. Parameters that are sharded
    cannot be run by one process alone: then it stays inert.

    Args:
        schema: Where a batch has what; the default reads ``(x, y)`` and Hugging Face batches.
        method: ``"gate"`` takes a forward and a backward a batch, ``"ablation"`` half a forward a head and batch.
        batches: Number of batches.
        every_n_epochs: Look after every n-th epoch.
        interactions: Also estimate the interaction of all pairs, for a forward and a backward a head and batch.
        layers: Names or glob patterns of attention modules; ``None`` takes all.
        seconds: Time for one validation; what was not measured by then is left out.
        rise: Largest rise of the loss, as a share of it, for heads that can go.
        loss: Returns one loss a sample from the module and a batch, ``(samples,)``, with a graph. ``None`` takes the
            cross entropy of the logits that the step computes, which needs labels in the batch and one label a sample;
            labels that are no class are left out, after one warning.

    Raises:
        ValueError: If a number is too small or ``method`` is another word.
        TypeError: If ``layers`` is a single string, or ``loss`` cannot be called.

    Example:
        >>> HeadImportance(method="ablation", seconds=60.0)
        HeadImportance(method='ablation', seconds=60.0)
    """

    _needs_logger = False  # the result is there without one

    def __init__(
        self,
        schema: BatchSchema | None = None,
        method: Literal["gate", "ablation"] = "gate",
        batches: int = 4,
        every_n_epochs: int = 1,
        interactions: bool = False,
        layers: Sequence[str] | None = None,
        seconds: float = 30.0,
        rise: float = 0.01,
        loss: Callable[[nn.Module, Any], Tensor] | None = None,
    ) -> None:
        super().__init__(schema, every_n_epochs)
        one_of("method", method, ("gate", "ablation"))
        self.method: Literal["gate", "ablation"] = method
        self.batches = at_least("batches", batches, 1)
        self.interactions = interactions
        self.layers = None if layers is None else name_list("layers", layers)
        for name, value in (("seconds", seconds), ("rise", rise)):
            check_number(name, value)
            if not value > 0:
                raise ValueError(f"`{name}` must be above 0, got {value}.")
        self.seconds, self.rise = seconds, rise
        if loss is not None and not callable(loss):
            raise TypeError(f"`loss` must be a function of module and batch, got {loss!r}.")
        self.loss = loss
        self.result: HeadStudy | None = None
        self._module: nn.Module | None = None
        self._held: list[HeldBatch] = []
        self._looks = self._complained = False

    def _start(self, trainer: Trainer, module: LightningModule) -> None:
        self.result, self._complained = None, False
        self._module = module
        if is_sharded(trainer):
            self._module = None
            rank_zero_warn("`HeadImportance` cannot run a network again whose parameters are sharded, and stays inert.")

    def _detach(self) -> None:
        super()._detach()
        self._module = None
        self._held = []

    def _begin(self, trainer: Trainer) -> None:
        self._held = []
        self._looks = trainer.is_global_zero and self._module is not None

    def _watch(self, batch: Any) -> AbstractContextManager[Any]:
        if not self._looks or len(self._held) >= self.batches or self._module is None:
            return nullcontext()
        held = hold(batch, self._module, self.schema, self.loss)
        self._held.append(held)
        return held.watch()

    def _finish(self, trainer: Trainer, module: LightningModule) -> None:
        held, self._held = self._held, []
        if held and not self._guard.off:
            with self._guarded():
                found = None
                try:
                    found = self._studied(trainer, module, held)
                except NoLossError as error:  # the next validation may know better
                    self._say(f"`HeadImportance` leaves this validation out. {error}")
                finally:  # samples that are left out may be why it fails
                    self._say(complaint(type(self).__name__, held))
                if found is not None:
                    self.result = found
                    if can_log(trainer):
                        self._write(trainer, found)

    def _say(self, said: str | None) -> None:
        if said is not None and not self._complained:
            self._complained = True
            rank_zero_warn(said)

    def _studied(self, trainer: Trainer, module: LightningModule, held: list[HeldBatch]) -> HeadStudy:
        around = trainer.precision_plugin.val_step_context

        def loss(_: nn.Module, batch: HeldBatch) -> Tensor:
            with around():
                return batch.losses(module)

        options: dict[str, Any] = {"method": self.method, "interactions": self.interactions, "seconds": self.seconds}
        return study(module, held, loss, self.layers, epoch=trainer.current_epoch, **options)

    def _write(self, trainer: Trainer, found: HeadStudy) -> None:
        pictures = {tag: self._writer.submit(draw) for tag, draw in study_drawings(found).items()}
        scalars = with_epoch(trainer, study_scalars(found, self.rise))
        log_point(trainer, self._writer, self._folder, pictures, scalars)
        text = study_text(found, self.rise)
        if text:
            log_text(trainer, "importance/summary", text)
