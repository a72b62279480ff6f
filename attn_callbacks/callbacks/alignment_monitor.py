"""AlignmentMonitor: which head of a translator knows which word came from which."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from attn_callbacks._checks import at_least, name_list, one_of
from attn_callbacks._lightning import rank_zero_warn
from attn_callbacks.batch import BatchSchema
from attn_callbacks.callbacks._agreed import log_monitored
from attn_callbacks.callbacks._alignment_batch import LinkedBatch, LinkReader
from attn_callbacks.callbacks._alignment_log import (
    GOLD_TAGS,
    SHAPE_TAGS,
    alignment_scalars,
    append_alignment,
    quantity_pictures,
)
from attn_callbacks.callbacks._alignment_pairs import Pair, pairs_of
from attn_callbacks.callbacks._alignment_sums import AlignmentSums
from attn_callbacks.callbacks._loggers import can_log, log_point, with_epoch
from attn_callbacks.callbacks._observer import ValidationObserver
from attn_callbacks.callbacks._samples import find_tokenizer
from attn_callbacks.callbacks._watch import QuietRecorder
from attn_callbacks.capture import AttentionCall
from attn_callbacks.capture.naming import call_name
from attn_callbacks.functional.alignment import LINKING
from attn_callbacks.metrics.alignment import AlignmentResult

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["AlignmentMonitor"]

Reader = int | str | Callable[[Any], Any] | None


class AlignmentMonitor(ValidationObserver):
    """Measure how every cross-attention head aligns target and source tokens, and log it after each validation.

    An observer: training is bit-identical with and without it. With gold links: alignment error rate, precision and
    recall of each head's links; always: monotonicity, coverage, coverage deviation and confidence. The definitions are
    in :mod:`attn_callbacks.functional`.

    Logs one layer x head picture a quantity (``alignment/heads/<quantity>``); the first few pairs as the best head sees
    them, with tokens and gold links (``alignment/pair_<i>``); with gold links ``alignment/error_rate``,
    ``alignment/precision`` and ``alignment/recall`` of the best head and ``alignment/error_rate_layer``, the mean over
    heads of the best layer; always ``alignment/<quantity>_mean`` over all heads. ``ModelCheckpoint`` and
    ``EarlyStopping`` can monitor all of these numbers; what a validation could not measure is unknown to them.
    ``attention/alignment.csv`` in the run's folder has everything. Without gold links the best head is the most
    confident one. :attr:`result` and the monitored numbers are there also without a logger.

    A row of cross-attention is a query of the decoder. In teacher forcing, row ``t`` reads token ``t - 1`` and predicts
    token ``t``: in which of the two rows a target token stands is for your gold links to say. The row that reads a
    token mostly aligns it better.

    Args:
        schema: Where a batch has what: ``tokens`` are the source tokens. The default reads ``(x, y)`` and Hugging Face
            batches.
        sure: Where it has gold links: a key, a position or a function of the batch. ``None``: there are none.
        possible: Where it has links that may or may not be there; the sure ones are possible, too.
        target_tokens: Where it has target tokens, ids or texts, for pictures; ``None`` looks for ``labels``.
        target_valid: Where it says which target tokens may be linked; ``None`` looks for ``decoder_attention_mask``
            and ``labels``, and else takes all.
        source_valid: Where it says which source tokens may be linked; ``None`` takes those that attention is allowed
            to. Leave out the end of the sentence here, which collects much attention.
        target_words: Where it has the number of the word of each target token, ``-1`` for special tokens. Links are
            then between words, see :func:`attn_callbacks.functional.word_maps`.
        source_words: The same for source tokens.
        method: How links are read off: ``"argmax"`` of each target token, or ``"mutual"`` largest weights.
        samples: Number of pairs that are drawn.
        layers: Names or glob patterns of attention modules; ``None`` takes all.
        cross_only: Look at cross-attention alone. ``False`` also takes self-attention, as where one sequence holds
            source and target; name ``layers`` then.
        every_n_epochs: Look after every n-th epoch.
        every_n_batches: Look at every n-th validation batch.
        dataloader: Validation loader to look at, by its index or, where loaders are a dict, by its name.
        max_tokens: Tokens of a side that a picture shows.

    Shape:
        - sure, possible: bool, ``(batch, target, source)``: tokens, or words where their numbers are given
        - target_valid, target_words: ``(batch, target tokens)``
        - source_valid, source_words: ``(batch, source tokens)``

    Raises:
        ValueError: If a number is below 1, ``method`` is another word, or there is ``possible`` without ``sure``.
        TypeError: If ``layers`` is a single string, or a reader is none.

    Example:
        >>> AlignmentMonitor(sure="links", method="mutual")
        AlignmentMonitor(sure='links', method='mutual')
    """

    _needs_logger = False  # the result, and what others monitor, is there without one

    def __init__(
        self,
        schema: BatchSchema | None = None,
        sure: Reader = None,
        possible: Reader = None,
        target_tokens: Reader = None,
        target_valid: Reader = None,
        source_valid: Reader = None,
        target_words: Reader = None,
        source_words: Reader = None,
        method: Literal["argmax", "mutual"] = "argmax",
        samples: int = 4,
        layers: Sequence[str] | None = None,
        cross_only: bool = True,
        every_n_epochs: int = 1,
        every_n_batches: int = 1,
        dataloader: int | str = 0,
        max_tokens: int = 48,
    ) -> None:
        super().__init__(schema, every_n_epochs, every_n_batches, dataloader)
        if possible is not None and sure is None:
            raise ValueError("`possible` needs `sure`: name the links without doubt, or all of them, as `sure`.")
        self.sure, self.possible = sure, possible
        self.target_tokens = target_tokens
        self.target_valid, self.source_valid = target_valid, source_valid
        self.target_words, self.source_words = target_words, source_words
        one_of("method", method, LINKING)
        self.method: Literal["argmax", "mutual"] = method
        self.samples = at_least("samples", samples, 0)
        self.layers = None if layers is None else name_list("layers", layers)
        self.cross_only = cross_only
        self.max_tokens = at_least("max_tokens", max_tokens, 1)
        self.result: AlignmentResult | None = None
        self._reader = self._make_reader()
        self._recorder: QuietRecorder | None = None
        self._tokenizer: Any = None
        self._monitored: dict[str, float] = {}
        self._clear()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Conclude and log, and give callbacks what they monitor, also where nothing was looked at."""
        super().on_validation_epoch_end(trainer, pl_module)
        if self._removes and not trainer.sanity_checking:
            log_monitored(trainer, pl_module, self._monitored, logger=not self._fitting)

    def _make_reader(self) -> LinkReader:
        return LinkReader(
            self.schema,
            self.target_tokens,
            sure=self.sure,
            possible=self.possible,
            target_valid=self.target_valid,
            source_valid=self.source_valid,
            target_words=self.target_words,
            source_words=self.source_words,
        )

    def _start(self, trainer: Trainer, module: LightningModule) -> None:
        self.result = None
        self._recorder = QuietRecorder(module, self.layers, self._measure, self._guard)
        self._sums = AlignmentSums(self.method, trainer.world_size)
        self._monitored = self._unknown()
        self._tokenizer = find_tokenizer(module, trainer)

    def _unknown(self) -> dict[str, float]:
        tags = (*(GOLD_TAGS if self.sure is not None else ()), *SHAPE_TAGS)
        return dict.fromkeys(tags, np.nan) if self._fitting else {}

    def _detach(self) -> None:
        super()._detach()
        self._clear()

    def _clear(self) -> None:
        self._recorder = self._tokenizer = None
        self._sums = AlignmentSums(self.method)
        self._told = False
        self._forget()

    def _forget(self) -> None:
        self._left = 0  # pairs still to be seen
        self._pairs: list[Pair] = []
        self._seen: list[Pair] = []  # of them, those of this batch
        self._found: LinkedBatch | None = None

    def _begin(self, trainer: Trainer) -> None:
        self._forget()
        self._left = self.samples if trainer.is_global_zero and can_log(trainer) else 0

    def _watch(self, batch: Any) -> AbstractContextManager[Any]:
        self._found = self._reader.read(batch)
        texts = self._reader.texts(batch, self._tokenizer, self._left) if self._left else []
        self._seen = pairs_of(texts, self._found, len(self._pairs))
        self._pairs += self._seen
        self._left -= len(self._seen)
        return self._recorder.watch() if self._recorder else nullcontext()

    def _measure(self, call: AttentionCall) -> None:
        if self._found is None or (self.cross_only and not call.is_cross):
            return
        with self._guarded():
            maps, layer = self._found.maps(call), call_name(call)
            self._sums.add(layer, **maps._asdict())
            for pair in self._seen:
                pair.take(layer, maps, self.max_tokens)

    def _finish(self, trainer: Trainer, module: LightningModule) -> None:
        result, scalars = None, {}
        with self._guarded():
            failure = self._guard.cause
            result = self._sums.conclude(trainer.strategy.root_device, failure=failure)
            if result is not None:
                self.result, scalars = result, alignment_scalars(result)
        if result is None and not self._guard.off and not self._told:
            self._told = True
            rank_zero_warn(
                "`AlignmentMonitor` saw no cross-attention, which an encoder or a decoder alone does not have: leave "
                "it out. Where one sequence holds source and target, name `layers` and pass `cross_only=False`."
            )
        self._monitored = self._unknown() | scalars
        if result is not None and trainer.is_global_zero and can_log(trainer):
            with self._guarded():
                # in `trainer.validate` Lightning writes them: what it returns is what it logs
                self._write(trainer, result, scalars if self._fitting else {})
        self._forget()

    def _write(self, trainer: Trainer, result: AlignmentResult, scalars: dict[str, float]) -> None:
        pictures, best = quantity_pictures(result, self._writer), result.best_head()
        if best is not None:
            layer, head = result.layer_names[best[0]], best[1]
            title = f"{layer}, head {head}, epoch {trainer.current_epoch}"
            drawn = {pair.number: pair.draw(self._writer, layer, head, self.method, title) for pair in self._pairs}
            pictures |= {f"alignment/pair_{n}": picture for n, picture in drawn.items() if picture is not None}
        log_point(trainer, self._writer, self._folder, pictures, with_epoch(trainer, scalars))
        if self._folder is not None:
            path = self._folder / "attention" / "alignment.csv"
            self._writer.submit(partial(append_alignment, path, trainer.current_epoch, trainer.global_step, result))
