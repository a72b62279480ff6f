"""TrainingHealth: an alarm when attention goes wrong, before the loss does."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attn_callbacks._checks import at_least, name_list
from attn_callbacks._lightning import Callback, rank_zero_warn
from attn_callbacks.batch import BatchSchema
from attn_callbacks.callbacks._agreed import log_monitored
from attn_callbacks.callbacks._arguments import ArgumentsOnly
from attn_callbacks.callbacks._guard import Guard
from attn_callbacks.callbacks._health_record import HealthRecord
from attn_callbacks.callbacks._host import to_host
from attn_callbacks.callbacks._layers import drawn_rows, known_tokens
from attn_callbacks.callbacks._loggers import log_point, log_text, with_epoch
from attn_callbacks.callbacks._processes import are_connected, from_all_processes
from attn_callbacks.callbacks._steps import StepTap, tap_step
from attn_callbacks.callbacks._watch import QuietRecorder
from attn_callbacks.callbacks._writer import BackgroundWriter
from attn_callbacks.capture import AttentionCall, call_name
from attn_callbacks.functional.health import HealthAlert, HealthThresholds
from attn_callbacks.functional.vitals import VITALS, head_vitals, pooled_vitals

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["TrainingHealth"]

_ENTROPY, _MAX_LOGIT = VITALS.index("entropy"), VITALS.index("max_logit")


class TrainingHealth(ArgumentsOnly, Callback):
    """Look at attention in every n-th training step and raise an alarm when it goes wrong.

    An observer: training is bit-identical with and without it. Told are entropy collapse, a large or fast growing
    score before the softmax, saturated and dead heads, sudden changes of a head, and attention that is not finite; when
    exactly is in :class:`~attn_callbacks.functional.health.HealthThresholds`. Each event is told once, as a warning and
    as text ``health/alert`` for loggers that take some; ``found`` lists step, layer and alert of this run.

    Logs ``health/alerts`` (how many events there were so far; dead heads, no reason to stop, are told and not counted),
    ``health/entropy_min`` (mean normalised entropy of the heads of the layer that has the lowest) and
    ``health/max_logit`` at every look. To callbacks that monitor they are given at the end of validations and training
    epochs: ``EarlyStopping("health/alerts", mode="min", divergence_threshold=0.5, patience=1000)`` stops at the first.

    A step that is looked at runs compiled modules eagerly and ends in one copy to the host, with several processes also
    in one exchange between them, of which all then know the same. The other steps cost one comparison.

    Args:
        schema: Where a batch has what; the default reads ``(x, y)`` and Hugging Face batches.
        layers: Names or glob patterns of attention modules; ``None`` takes all.
        rows: Query rows looked at in each sequence, drawn afresh from equal strata. ``max_logit`` is that of these.
        every_n_steps: Look at every n-th training step (batch), beginning with the first.
        thresholds: When to raise an alarm.
        seed: Seed of the drawn rows.

    Raises:
        ValueError: If a number is below 1.
        TypeError: If ``layers`` is a single string, or ``schema`` or ``thresholds`` is something else.

    Example:
        >>> TrainingHealth(every_n_steps=10)
        TrainingHealth(every_n_steps=10)
    """

    def __init__(
        self,
        schema: BatchSchema | None = None,
        layers: Sequence[str] | None = None,
        rows: int = 16,
        every_n_steps: int = 50,
        thresholds: HealthThresholds | None = None,
        seed: int = 0,
    ) -> None:
        for name, value, kind in (("schema", schema, BatchSchema), ("thresholds", thresholds, HealthThresholds)):
            if value is not None and not isinstance(value, kind):
                raise TypeError(f"`{name}` must be a `{kind.__name__}`, got {value!r}. Write {kind.__name__}(...).")
        self.schema = schema or BatchSchema()
        self.layers = None if layers is None else name_list("layers", layers)
        self.rows = at_least("rows", rows, 1)
        self.every_n_steps = at_least("every_n_steps", every_n_steps, 1)
        self.thresholds = thresholds or HealthThresholds()
        self.seed = seed
        self.found: list[tuple[int, str, HealthAlert]] = []
        self._guard = Guard("`TrainingHealth`")
        self._writer = BackgroundWriter(self._guard)
        self._record = HealthRecord(self.thresholds)
        self._removes: list[Callable[[], None]] = []
        self._recorder: QuietRecorder | None = None
        self._vitals: dict[str, list[Tensor]] = {}
        self._lowest = self._highest = math.nan
        self._steps = 0
        self._due = self._ended = False

    @property
    def state_key(self) -> str:
        """Tells instances apart that look at other layers or steps."""
        return f"TrainingHealth[layers={self.layers},every_n_steps={self.every_n_steps}]"

    def state_dict(self) -> dict[str, Any]:
        """Return what the alarms rest on."""
        return {"steps": self._steps, **self._record.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the count of steps, what is remembered of layers, and which events were told."""
        self._steps = int(state_dict.get("steps", 0))
        self._record.load_state_dict(state_dict)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listen to ``training_step``."""
        self._detach()  # one instance may serve two runs
        if stage == "fit":
            self._guard.off = self._ended = False
            self.found, self._steps, self._record = [], 0, HealthRecord(self.thresholds)
            self._lowest = self._highest = math.nan
            self._generator = torch.Generator()
            self._recorder = QuietRecorder(pl_module, self.layers, self._measure, self._guard)
            self._removes.append(tap_step(pl_module, "training_step", StepTap(context=self._around)))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Decide whether this step is looked at."""
        self._due = not self._ended and self._steps % self.every_n_steps == 0
        if self._due:
            self._vitals = {}
            self._generator.manual_seed(self.seed + 1_000_003 * self._steps + trainer.global_rank)
        self._steps += 1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Conclude from the look at this step."""
        if self._due:
            self._due = False
            self._conclude(trainer)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give callbacks what they monitor."""
        self._give(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do the same."""
        self._give(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop listening."""
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Do the same; ``teardown`` does not run after an exception."""
        self._detach()

    def _detach(self) -> None:
        for remove in self._removes:
            remove()
        self._removes = []
        self._recorder, self._vitals, self._due = None, {}, False
        self._writer.close()

    def _around(self, batch: Any) -> AbstractContextManager[Any]:
        if not self._due or self._guard.off or self._recorder is None:
            return nullcontext()
        self._valid = None
        with self._guard.block():
            self._valid = self.schema.flags("valid", batch)
        return self._recorder.watch()

    def _measure(self, call: AttentionCall) -> None:
        call = known_tokens(call, self._valid)
        rows, real = drawn_rows(call, self.rows, self._generator)
        vitals = head_vitals(call.weights(rows), call.logits(rows), allowed=call.allowed(rows), valid=real)
        self._vitals.setdefault(call_name(call), []).append(pooled_vitals(vitals))

    def _conclude(self, trainer: Trainer) -> None:
        own: dict[str, Tensor] = {}
        with self._guard.block():
            pooled = [pooled_vitals(torch.stack(looks)) for looks in self._vitals.values()]
            own = dict(
                zip(self._vitals, to_host([each.to(trainer.strategy.root_device) for each in pooled]), strict=True)
            )
        self._vitals = {}
        together = are_connected(trainer.world_size)
        shares = from_all_processes((self._guard.off, own), is_distributed=together)
        with self._guard.block():
            if any(failed for failed, _ in shares):
                self._ended = True  # on all processes at once: none may wait for one that has left
                raise RuntimeError("A process could not look at its step.")
            self._take_in(trainer, _pooled([held for _, held in shares]))

    def _take_in(self, trainer: Trainer, vitals: Mapping[str, Tensor]) -> None:
        if not vitals:
            return
        told = self._record.add(vitals)
        self.found += [(trainer.global_step, layer, alert) for layer, alert in told]
        self._lowest = float(torch.stack([each[:, _ENTROPY].mean() for each in vitals.values()]).min())
        highest = float(torch.stack([each[:, _MAX_LOGIT].max() for each in vitals.values()]).max())
        self._highest = highest if math.isfinite(highest) else math.nan
        if not trainer.is_global_zero:
            return
        for layer, alert in told:
            text = f"{alert.kind.replace('_', ' ')} in '{layer}' at step {trainer.global_step}: {alert.text}."
            rank_zero_warn(f"`TrainingHealth`: {text}")
            log_text(trainer, "health/alert", text)
        known = {name: value for name, value in self._values().items() if value == value}  # NaN is not itself
        log_point(trainer, self._writer, None, {}, with_epoch(trainer, known))

    def _values(self) -> dict[str, float]:
        names = ("health/alerts", "health/entropy_min", "health/max_logit")
        return dict(zip(names, (float(self._record.events), self._lowest, self._highest), strict=True))

    def _give(self, trainer: Trainer, module: LightningModule) -> None:
        if self._recorder is not None and not trainer.sanity_checking:
            log_monitored(trainer, module, self._values(), logger=False)


def _pooled(shares: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Combine the vitals of each layer over processes; of sizes that differ, those of the first count."""
    pooled = {}
    for layer in dict.fromkeys(name for held in shares for name in held):
        parts = [held[layer] for held in shares if layer in held]
        pooled[layer] = pooled_vitals(torch.stack([part for part in parts if part.shape == parts[0].shape]))
    return pooled
