"""ErrorAnalysis: which heads attend differently on mistakes, and the samples that went most wrong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attn_callbacks._checks import at_least, name_list, one_of
from attn_callbacks._lightning import rank_zero_warn
from attn_callbacks.batch import BatchSchema
from attn_callbacks.callbacks._class_labels import label_complaint
from attn_callbacks.callbacks._error_exchange import Counts, count_samples, exchanged
from attn_callbacks.callbacks._error_gallery import WorstSamples
from attn_callbacks.callbacks._error_outcome import Outcome, read_outcome, sample_fields
from attn_callbacks.callbacks._error_pictures import error_drawings, read_entry
from attn_callbacks.callbacks._error_result import ErrorAnalysisResult, conclude_errors
from attn_callbacks.callbacks._error_step import ErrorStep
from attn_callbacks.callbacks._error_sums import ErrorSums
from attn_callbacks.callbacks._error_text import error_scalars, error_text
from attn_callbacks.callbacks._frames import FRAMES, Frames, check_frames, frame_colours
from attn_callbacks.callbacks._loggers import can_log, log_point, log_text, with_epoch
from attn_callbacks.callbacks._observer import ValidationObserver
from attn_callbacks.callbacks._processes import are_connected
from attn_callbacks.callbacks._samples import find_tokenizer
from attn_callbacks.callbacks._watch import QuietRecorder, forward_outputs
from attn_callbacks.capture import AttentionCall
from attn_callbacks.functional import STATISTICS
from attn_callbacks.render import Picture

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["ErrorAnalysis"]

_MOST_CLASSES = 64  # of more, classes are not told apart


class ErrorAnalysis(ValidationObserver):
    """Compare what heads do on samples that are predicted wrong with what they do on the others.

    An observer: training is bit-identical with and without it. Every statistic of `head_statistics`, and the attention
    mass on every token set that the batch marks, is averaged over wrong and right samples and over each class.
    Differences are given in standard deviations (Hedges' g) with p-values corrected for all layers, heads and
    statistics: a head that is named differs, and of validations without any difference one in twenty names one.

    Logs one layer x head picture of effects a statistic (``errors/<statistic>``), the text ``errors/differences``,
    and the scalars ``errors/rate``, ``errors/heads`` (heads that differ) and ``errors/largest_effect``. The gallery
    ``errors/worst/<place>`` and ``errors/confident/<place>`` shows the maps of the samples of the highest loss, and of
    those that were wrong with the highest confidence, in the heads that differ most. :attr:`result` keeps everything,
    also without a logger. Reads the first validation loader; labels come from the batch, logits as `BatchSchema` says.
    Samples whose label is negative do not count; nor do those whose label is no class, after one warning.

    The gallery holds the queries and keys of a batch until its step ends, then computes the maps of at most
    ``2 * samples`` of its samples. It keeps ``4 * samples * layers * heads * max_tokens ** 2`` bytes of maps at most,
    and of the same samples what the batch holds of images and token ids, and two bytes a layer and token of masks.

    Args:
        schema: Where a batch has what; the default reads ``(x, y)`` and Hugging Face batches.
        layers: Names or glob patterns of attention modules; ``None`` takes all.
        samples: Samples in each gallery; 0 leaves them out.
        every_n_epochs: Look after every n-th epoch.
        every_n_batches: Look at every n-th batch.
        rows: Query rows looked at in each sequence, drawn afresh from equal strata; shorter sequences are exact.
        classes: Names of the classes; empty: numbers. Above 64 classes they are not told apart.
        heads: Heads shown of each sample.
        max_tokens: Longest side of a map in the gallery; longer ones are pooled to it.
        seed: Seed of the drawn rows.
        frames: What a frame's colour stands for in the gallery: the number of the ``"head"``, or the ``"cluster"`` that
            ``HeadRoles``, which has to stand before it, found.

    Raises:
        ValueError: If a number is too small, or ``frames`` is another word.
        MisconfigurationException: In ``setup``, for frames by cluster without a ``HeadRoles`` that looks for clusters.
        TypeError: If ``layers`` or ``classes`` is a single string.

    Example:
        >>> ErrorAnalysis(samples=4, classes=["bad", "good"])
        ErrorAnalysis(samples=4, classes=('bad', 'good'))
    """

    _needs_logger = False  # the result is there without one

    def __init__(
        self,
        schema: BatchSchema | None = None,
        layers: Sequence[str] | None = None,
        samples: int = 8,
        every_n_epochs: int = 1,
        every_n_batches: int = 1,
        rows: int = 64,
        classes: Sequence[str] = (),
        heads: int = 12,
        max_tokens: int = 128,
        seed: int = 0,
        frames: Frames = "head",
    ) -> None:
        super().__init__(schema, every_n_epochs, every_n_batches)
        self.layers = None if layers is None else name_list("layers", layers)
        self.samples = at_least("samples", samples, 0)
        self.rows = at_least("rows", rows, 1)
        self.classes = name_list("classes", classes)
        self.heads = at_least("heads", heads, 1)
        self.max_tokens = at_least("max_tokens", max_tokens, 1)
        self.seed = seed
        self.frames: Frames = one_of("frames", frames, FRAMES)
        self.result: ErrorAnalysisResult | None = None
        self._recorder: QuietRecorder | None = None
        self._tokenizer: Any = None
        self._is_distributed = self._has_logits = self._complained = False
        self._classes = 0
        self._generator = torch.Generator()
        self._clear()

    def _start(self, trainer: Trainer, module: LightningModule) -> None:
        check_frames(self.frames, trainer, type(self).__name__)
        self.result = None
        self._has_logits = self._complained = False
        self._is_distributed = are_connected(trainer.world_size)
        self._recorder = QuietRecorder(module, self.layers, self._measure, self._guard)
        self._tokenizer = find_tokenizer(module, trainer)

    def _detach(self) -> None:
        super()._detach()
        self._recorder = self._tokenizer = None
        self._clear()

    def _clear(self) -> None:
        self._sums = ErrorSums(is_distributed=self._is_distributed)
        self._galleries = {name: WorstSamples(self.samples) for name in ("worst", "confident") if self.samples}
        self._counts: Counts | None = None
        self._seen = 0
        self._step = ErrorStep()

    def _begin(self, trainer: Trainer) -> None:
        self._clear()
        self._generator.manual_seed(self.seed + 1_000_003 * trainer.global_step + trainer.global_rank)

    def _watch(self, batch: Any) -> AbstractContextManager[Any]:
        sets = {name: self.schema.flags(name, batch) for name in self.schema.token_sets}
        size = self.schema.size(batch)
        self._step = ErrorStep(self.schema.flags("valid", batch), sets, size, keep=bool(self._galleries))
        return self._listen()

    @contextmanager
    def _listen(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self._recorder is not None:
                stack.enter_context(self._recorder.watch())
                if not self._has_logits:
                    stack.enter_context(forward_outputs(self._recorder.model, self._step.outputs))
            yield

    def _measure(self, call: AttentionCall) -> None:
        with self._guarded():
            self._step.measure(call, self.rows, self._generator)

    def _add(self, outputs: Any, batch: Any) -> None:
        step, self._step = self._step, ErrorStep()
        with self._guarded(), torch.no_grad():
            self._has_logits = self._has_logits or self.schema.step_logits(outputs) is not None
            outcome = read_outcome(self.schema, self.schema.step_logits(outputs, step.outputs), batch)
            classes = outcome.classes if outcome.classes <= _MOST_CLASSES else 1
            group = outcome.target if classes > 1 else outcome.target.clamp_max(0)
            counts = count_samples(group, outcome.right, classes, outcome.strangers)
            self._counts = counts if self._counts is None else self._counts.plus(counts)
            self._classes = outcome.classes
            for name, values in step.values.items():
                self._sums.add(name, values, group, outcome.right, classes)
            if self._galleries and step.calls:
                self._keep(step, outcome, batch)
            self._seen += len(group)

    def _keep(self, step: ErrorStep, outcome: Outcome, batch: Any) -> None:
        """Let the galleries take those samples of a batch that they want; both see the same maps."""
        scores = {"worst": outcome.loss, "confident": outcome.mistaken_confidence}
        chosen = [gallery.candidates(scores[name]) for name, gallery in self._galleries.items()]
        index = torch.cat(chosen)
        fields = {**outcome.fields(self._seen), **sample_fields(self.schema, batch)}
        known = {name: field.to(index.device)[index] for name, field in fields.items()}
        known |= step.maps(index, self.max_tokens)
        start = 0
        for (name, gallery), places in zip(self._galleries.items(), chosen, strict=True):
            own = slice(start, start + len(places))
            gallery.add(scores[name][places], {key: field[own] for key, field in known.items()})
            start = own.stop

    def _finish(self, trainer: Trainer, module: LightningModule) -> None:
        result = None
        with self._guarded(), torch.inference_mode(False):
            result = self._concluded(trainer)
        if result is not None:
            self.result = result
            if trainer.is_global_zero and can_log(trainer):
                with self._guarded():
                    self._write(trainer, result)
        self._clear()

    def _concluded(self, trainer: Trainer) -> ErrorAnalysisResult | None:
        failure = self._guard.cause
        device, together = trainer.strategy.root_device, self._is_distributed
        known = exchanged(self._sums, self._counts, self._galleries, device, failure=failure, is_distributed=together)
        if known is None:
            return None
        layers, sums, (samples, strangers), worst = known
        self._complain(strangers, max(len(samples), self._classes))
        names = self._class_names(len(samples))
        statistics = (*STATISTICS, *(f"mass/{name}" for name in self.schema.token_sets))
        result = conclude_errors(trainer.current_epoch, layers, statistics, names, sums, samples)
        shown = {
            name: tuple(read_entry(entry, layers, self._tokenizer) for entry in entries)
            for name, entries in worst.items()
        }
        return replace(result, worst=shown.get("worst", ()), confident=shown.get("confident", ()))

    def _complain(self, strangers: Tensor, classes: int) -> None:
        said = None if self._complained else label_complaint(type(self).__name__, strangers, classes)
        if said is not None:
            self._complained = True
            rank_zero_warn(said)

    def _class_names(self, classes: int) -> tuple[str, ...]:
        if len(self.classes) > classes > 1 or 0 < len(self.classes) < classes:
            raise ValueError(f"`classes` must name the {classes} classes of the logits, got {self.classes}.")
        return self.classes or (tuple(map(str, range(classes))) if classes > 1 else ("all",))

    def _write(self, trainer: Trainer, result: ErrorAnalysisResult) -> None:
        colours = partial(frame_colours, self.frames, trainer)
        pictures: dict[str, Future[Picture]] = {
            tag: self._writer.submit(draw, size) for tag, draw, size in error_drawings(result, self.heads, colours)
        }
        log_point(trainer, self._writer, self._folder, pictures, with_epoch(trainer, error_scalars(result)))
        log_text(trainer, "errors/differences", error_text(result))
