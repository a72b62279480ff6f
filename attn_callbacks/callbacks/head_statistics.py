"""HeadStatistics: ten numbers for every attention head, epoch by epoch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attn_callbacks._checks import at_least, name_list
from attn_callbacks.batch import BatchSchema
from attn_callbacks.callbacks._head_table import append_table, layer_scalars, statistic_means
from attn_callbacks.callbacks._layers import call_name, drawn_rows, known_tokens, samples_of
from attn_callbacks.callbacks._loggers import log_agreed, log_pictures, log_scalars, run_folder
from attn_callbacks.callbacks._observer import ValidationObserver
from attn_callbacks.callbacks._watch import QuietRecorder
from attn_callbacks.capture import AttentionCall
from attn_callbacks.capture.scores import softmax_rows
from attn_callbacks.functional import STATISTICS, head_statistics
from attn_callbacks.metrics import HeadStatisticsMetric, HeadStatisticsResult
from attn_callbacks.render import layer_head_grid

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["HeadStatistics"]


class HeadStatistics(ValidationObserver):
    """Measure what every attention head does on the validation data, and log it after each validation.

    An observer: training is bit-identical with and without it. For each layer and head: entropy (also relative to the
    keys allowed), confidence, attended distance, long-range mass, mass on the token itself, the previous, the next and
    the first one, and the largest logit. Each as mean, standard error (samples are independent, rows of one are not)
    and median over samples; the definitions are in :func:`attn_callbacks.functional.head_statistics`.

    Logs one layer x head picture a statistic (``heads/<statistic>``), the mean over heads of each layer
    (``heads/<statistic>/<layer>``) and over all (``heads/<statistic>_mean``, which ``ModelCheckpoint`` can monitor).
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

    Raises:
        ValueError: If a number is below 1.
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
    ) -> None:
        super().__init__(schema, every_n_epochs, every_n_batches)
        self.layers = None if layers is None else name_list("layers", layers)
        self.rows = at_least("rows", rows, 1)
        self.per_head = per_head
        self.seed = seed
        self.result: HeadStatisticsResult | None = None
        self.layer_names: tuple[str, ...] = ()
        self._recorder: QuietRecorder | None = None
        self._metric: HeadStatisticsMetric | None = None
        self._valid: Tensor | None = None

    def _start(self, trainer: Trainer, module: LightningModule) -> None:
        self._recorder = QuietRecorder(module, self.layers, self._measure, self._guard)
        self._generator = torch.Generator()
        self._layers: dict[str, int] = {}

    def _detach(self) -> None:
        super()._detach()
        self._recorder = self._metric = self._valid = None

    def _begin(self, trainer: Trainer) -> None:
        self._generator.manual_seed(self.seed + 1_000_003 * trainer.global_step + trainer.global_rank)

    def _watch(self, batch: Any) -> AbstractContextManager[Any]:
        self._valid = self.schema.flags("valid", batch)
        self._samples = self.schema.size(batch)
        return self._recorder.watch() if self._recorder else nullcontext()

    def _measure(self, call: AttentionCall) -> None:
        call = known_tokens(call, self._valid)
        rows, real = drawn_rows(call, self.rows, self._generator)
        logits = call.logits(rows)  # from which weights follow: the scores are not computed twice
        statistics = head_statistics(
            call.weights(rows) if logits is None else softmax_rows(logits),
            logits,
            positions=rows,
            allowed=call.allowed(rows),
            valid=real,
            key_valid=call.key_valid,
            square=not call.is_cross and call.shape[2] == call.shape[3],
        )
        layer = self._layers.setdefault(call_name(call), len(self._layers))
        self._metric = _sized(self._metric, len(self._layers), statistics.shape[1], call.device)
        self._metric.update(layer, *samples_of(statistics, call.query_valid.sum(dim=-1), self._samples))

    def _finish(self, trainer: Trainer, module: LightningModule) -> None:
        folder = run_folder(trainer)
        metric = self._metric = self._agreed_metric(trainer)
        if metric is None:
            return
        result = self.result = HeadStatisticsResult(*(tensor.cpu() for tensor in metric.compute()))
        metric.reset()
        unseen = (f"layer_{layer}" for layer in range(len(self._layers), metric.layers))
        self.layer_names = (*self._layers, *unseen)
        for name, value in statistic_means(result.mean.flatten(0, 1)).items():
            log_agreed(module, f"heads/{name}_mean", value)
        if trainer.is_global_zero:
            with self._guarded():
                self._write(trainer, result, folder)

    def _agreed_metric(self, trainer: Trainer) -> HeadStatisticsMetric | None:
        """Return a metric of the same size on every process, also on one whose share of the data was empty."""
        own, device = self._metric, trainer.strategy.root_device
        sizes = torch.tensor([own.layers, own.heads] if own else [0, 0], device=device)
        layers, heads = trainer.strategy.reduce(sizes, reduce_op="max").tolist()
        return _sized(own, layers, heads, device) if layers else None

    def _write(self, trainer: Trainer, result: HeadStatisticsResult, folder: Path | None) -> None:
        labels = self.layer_names
        log_scalars(trainer, dict(layer_scalars(result, labels, self.per_head)))
        pictures = {
            f"heads/{name}": layer_head_grid(values.numpy(), title=name, layer_labels=labels)
            for name, values in zip(STATISTICS, result.mean.unbind(dim=-1), strict=True)
            if not values.isnan().all()
        }
        log_pictures(trainer, pictures, folder)
        if folder is not None:
            table = folder / "attention" / "head_statistics.csv"
            append_table(table, trainer.current_epoch, trainer.global_step, result, labels)


def _sized(metric: HeadStatisticsMetric | None, layers: int, heads: int, device: torch.device) -> HeadStatisticsMetric:
    """Return a metric with room for so many layers and heads, and with what ``metric`` holds."""
    if metric is not None and layers <= metric.layers and heads <= metric.heads:
        return metric
    if metric is None:
        return HeadStatisticsMetric(layers, heads).to(device)
    grown = HeadStatisticsMetric(max(layers, metric.layers), max(heads, metric.heads)).to(device)
    for name in ("moments", "histogram", "highest"):
        grown.writable(name)[: metric.layers, : metric.heads] = getattr(metric, name)
    return grown
