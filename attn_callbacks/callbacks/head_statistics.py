"""HeadStatistics: ten numbers for every attention head, epoch by epoch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from attn_callbacks._checks import at_least, name_list
from attn_callbacks.batch import BatchSchema
from attn_callbacks.callbacks._agreed import log_monitored
from attn_callbacks.callbacks._gates import GateGradients
from attn_callbacks.callbacks._guard import Guard
from attn_callbacks.callbacks._head_sums import HeadSums
from attn_callbacks.callbacks._head_table import (
    append_importance,
    append_table,
    importance_scalars,
    layer_scalars,
    statistic_means,
)
from attn_callbacks.callbacks._layers import drawn_rows, known_tokens, samples_of
from attn_callbacks.callbacks._loggers import log_point, with_epoch
from attn_callbacks.callbacks._observer import ValidationObserver
from attn_callbacks.callbacks._steps import tap_step
from attn_callbacks.callbacks._watch import QuietRecorder
from attn_callbacks.capture import AttentionCall, call_name, exact_head_statistics, sampled_head_statistics
from attn_callbacks.functional import STATISTICS
from attn_callbacks.metrics import HeadImportanceResult, HeadStatisticsResult
from attn_callbacks.render import Picture, layer_head_grid

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["HeadStatistics"]

Array = np.ndarray[Any, Any]

_MEASURES = {"sampled": sampled_head_statistics, "exact": exact_head_statistics}


class HeadStatistics(ValidationObserver):
    """Measure what every attention head does on the validation data, and log it after each validation.

    An observer: training is bit-identical with and without it. For each layer and head: entropy (also relative to the
    keys allowed), confidence, attended distance, long-range mass, mass on the token itself, the previous, the next and
    the first one, and the largest logit. Each as mean, standard error (samples are independent, rows of one are not)
    and median over samples; the definitions are in :func:`attn_callbacks.functional.head_statistics`.

    Logs one layer x head picture a statistic (``heads/<statistic>``), the mean over heads of each layer
    (``heads/<statistic>/<layer>``) and over all (``heads/<statistic>_mean``, which ``ModelCheckpoint`` can monitor).
    A validation that is not looked at gives monitors the last value again, or the worst one if none is known yet:
    ``EarlyStopping`` wants a ``patience`` above ``every_n_epochs``.
    The table ``attention/head_statistics.csv`` in the run's folder has everything, medians as ``<statistic>_median``.
    Reads the first validation loader.

    Args:
        schema: Where a batch has what; the default reads ``(x, y)`` and Hugging Face batches.
        layers: Names or glob patterns of attention modules; ``None`` takes all.
        rows: Query rows looked at in each sequence, drawn afresh from equal strata; shorter sequences are exact.
        every_n_batches: Look at every n-th validation batch.
        every_n_epochs: Look after every n-th epoch.
        per_head: Also log each head as scalars ``heads/<statistic>/<layer>/head_<i>``.
        seed: Seed of the drawn rows.
        mode: ``"sampled"`` looks at the drawn rows only. ``"exact"`` looks at all, for the time of three or four more
            fused forwards of every layer, and without a matrix of queries x keys. Behind a FlexAttention ``score_mod``
            the drawn rows have to do.
        importance_every_n_steps: Also measure how much the training loss hangs on each head (the size of the gradient
            of a gate on it, averaged over samples), in the backward of every n-th training step; for what
            that costs see ``docs/performance.md``. Logged as ``heads/importance`` with the statistics, for which one
            more copy to the host, and with several processes one more exchange, is made after each validation; the
            statistics alone take one. ``None`` leaves training steps alone.

    Raises:
        ValueError: If a number is below 1 or ``mode`` is another word.
        TypeError: If ``layers`` is a single string.

    Example:
        >>> HeadStatistics(rows=32, layers=["encoder.layer.*"])
        HeadStatistics(layers=('encoder.layer.*',), rows=32)
    """

    def __init__(
        self,
        schema: BatchSchema | None = None,
        layers: Sequence[str] | None = None,
        rows: int = 64,
        every_n_batches: int = 1,
        every_n_epochs: int = 1,
        per_head: bool = False,
        seed: int = 0,
        mode: Literal["sampled", "exact"] = "sampled",
        importance_every_n_steps: int | None = None,
    ) -> None:
        super().__init__(schema, every_n_epochs, every_n_batches)
        if mode not in _MEASURES:
            raise ValueError(f"`mode` must be 'sampled' or 'exact', got {mode!r}.")
        self.layers = None if layers is None else name_list("layers", layers)
        self.rows = at_least("rows", rows, 1)
        self.per_head = per_head
        self.seed = seed
        self.mode: Literal["sampled", "exact"] = mode
        if importance_every_n_steps is not None:
            at_least("importance_every_n_steps", importance_every_n_steps, 1)
        self.importance_every_n_steps = importance_every_n_steps
        self.result: HeadStatisticsResult | None = None
        self.importance: HeadImportanceResult | None = None
        self.layer_names: tuple[str, ...] = ()
        self.importance_layer_names: tuple[str, ...] = ()
        self._recorder: QuietRecorder | None = None
        self._gates: GateGradients | None = None
        self._sums = HeadSums()
        self._monitored: dict[str, float] = {}
        self._valid: Tensor | None = None

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Conclude and log, and give callbacks what they monitor, also where nothing was looked at."""
        super().on_validation_epoch_end(trainer, pl_module)
        if self._removes and not trainer.sanity_checking:
            log_monitored(trainer, pl_module, self._monitored, logger=not self._fitting)

    def _start(self, trainer: Trainer, module: LightningModule) -> None:
        self._recorder = QuietRecorder(module, self.layers, self._measure, self._guard)
        self._generator = torch.Generator()
        self._sums = HeadSums(trainer.world_size)
        self._monitored = dict.fromkeys((f"heads/{name}_mean" for name in STATISTICS if self._fitting), np.nan)
        every = self.importance_every_n_steps
        if every is not None and self._fitting:
            guard = Guard("The importance of `HeadStatistics`")  # its own: the statistics go on without it
            self._gates = GateGradients(trainer, module, self.layers, every, self.schema, guard)
            self._removes.append(tap_step(module, "training_step", self._gates.tap))
            self._monitored["heads/importance_mean"] = np.nan

    def _detach(self) -> None:
        super()._detach()
        self._recorder = self._gates = self._valid = None
        self._sums = HeadSums()

    def _begin(self, trainer: Trainer) -> None:
        self._generator.manual_seed(self.seed + 1_000_003 * trainer.global_step + trainer.global_rank)

    def _watch(self, batch: Any) -> AbstractContextManager[Any]:
        self._valid = self.schema.flags("valid", batch)
        self._samples = self.schema.size(batch)
        return self._recorder.watch() if self._recorder else nullcontext()

    def _measure(self, call: AttentionCall) -> None:
        call = known_tokens(call, self._valid)
        rows, real = drawn_rows(call, self.rows, self._generator)
        statistics = _MEASURES[self.mode](call, rows, real)
        self._sums.add(call_name(call), *samples_of(statistics, call.query_valid.sum(dim=-1), self._samples))

    def _finish(self, trainer: Trainer, module: LightningModule) -> None:
        result, importance = None, self._gates.result() if self._gates is not None else None
        with self._guarded():
            found = self._sums.conclude(trainer.strategy.root_device, failed=self._guard.off)
            if found is not None:
                self.layer_names, self.result = found
                result = self.result
        if importance is not None and self._gates is not None:
            self.importance, self.importance_layer_names = importance, self._gates.layer_names
        means = _means(result, importance)
        self._monitored |= means
        if trainer.is_global_zero:
            with self._guarded():
                # in `trainer.validate` Lightning writes them: what it returns is what it logs
                self._write(trainer, result, importance, means if self._fitting else {})

    def _write(
        self,
        trainer: Trainer,
        result: HeadStatisticsResult | None,
        importance: HeadImportanceResult | None,
        scalars: dict[str, float],
    ) -> None:
        pictures: dict[str, Future[Picture]] = {}
        tables: list[Callable[[Path, int, int], None]] = []
        if result is not None:
            fields = [field.numpy() for field in (result.mean, result.standard_error, result.median)]
            for name, values in zip(STATISTICS, fields[0].transpose(2, 0, 1), strict=True):
                if not np.isnan(values).all():
                    pictures[f"heads/{name}"] = self._drawn(values, name, self.layer_names)
            scalars = {**scalars, **dict(layer_scalars(result, self.layer_names, self.per_head))}
            tables.append(partial(append_table, fields=fields, labels=self.layer_names))
        if importance is not None and not importance.mean.isnan().all():
            names, own = self.importance_layer_names, [importance.mean.numpy(), importance.standard_error.numpy()]
            pictures["heads/importance"] = self._drawn(own[0], "importance", names)
            scalars = {**scalars, **dict(importance_scalars(importance.mean, names, self.per_head))}
            tables.append(partial(append_importance, fields=own, labels=names))
        log_point(trainer, self._writer, self._folder, pictures, with_epoch(trainer, scalars))
        if self._folder is not None:
            path = self._folder / "attention" / "head_statistics.csv"
            for append in tables:
                self._writer.submit(partial(append, path, trainer.current_epoch, trainer.global_step))

    def _drawn(self, values: Array, name: str, labels: Sequence[str]) -> Future[Picture]:
        return self._writer.submit(partial(layer_head_grid, values, title=name, layer_labels=labels))


def _means(result: HeadStatisticsResult | None, importance: HeadImportanceResult | None) -> dict[str, float]:
    """Tag and value of what is monitored, as far as it is defined."""
    means = {} if result is None else statistic_means(result.mean.flatten(0, 1))
    if importance is not None and not importance.mean.isnan().all():
        means["importance"] = float(importance.mean.nanmean())
    return {f"heads/{name}_mean": value for name, value in means.items()}
