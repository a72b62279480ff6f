"""AttentionHeatmaps: where every head looks on the same few samples, epoch by epoch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from attn_callbacks._checks import at_least, name_list, one_of
from attn_callbacks.batch import BatchSchema
from attn_callbacks.callbacks._frames import FRAMES, Frames, check_frames, frame_colours
from attn_callbacks.callbacks._host import to_host
from attn_callbacks.callbacks._layers import known_tokens, maps_per_sample
from attn_callbacks.callbacks._loggers import log_point
from attn_callbacks.callbacks._observer import ValidationObserver
from attn_callbacks.callbacks._samples import Sample, find_tokenizer, patch_grid, read_samples
from attn_callbacks.callbacks._watch import QuietRecorder
from attn_callbacks.capture import AttentionCall, call_name
from attn_callbacks.render import Picture, attention_heads, overlay

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["AttentionHeatmaps"]

Array = np.ndarray[Any, Any]


class AttentionHeatmaps(ValidationObserver):
    """Draw the attention of every head on fixed validation samples after each validation.

    An observer: training is bit-identical with and without it. One picture a sample and layer,
    ``attention/<sample>/<layer>``: all heads side by side, each in a frame of its own colour, with token labels where
    they fit; in all epochs, layers and heads of a sample a colour means the same weight. For image models,
    ``attention/<sample>/<layer>/image`` lays the attention of the class token (without one, the mean over patches) over
    the image. Taken in eval mode inside the normal validation pass. Text is shown without padding; sequences longer
    than ``max_tokens`` are pooled, so that rows still sum to one.

    The samples are the first ones of the first validation loader: the same every time unless it shuffles. Token ids
    become text where the module or the data module has a ``tokenizer``.

    Args:
        schema: Where a batch has what; the default reads ``(x, y)`` and Hugging Face batches.
        samples: Number of samples.
        layers: Names or glob patterns of attention modules; ``None`` takes all.
        every_n_epochs: Draw after every n-th epoch.
        max_tokens: Longest side of a map; longer ones are pooled to it.
        frames: What a frame's colour stands for: the number of the ``"head"``, or the ``"cluster"`` that ``HeadRoles``,
            among the callbacks too, found at its last look (grey before that).

    Raises:
        ValueError: If a number is below 1, or ``frames`` is another word.
        MisconfigurationException: In ``setup``, for frames by cluster without a ``HeadRoles`` that looks for clusters.
        TypeError: If ``layers`` is a single string.

    Example:
        >>> AttentionHeatmaps(samples=2)
        AttentionHeatmaps(samples=2)
    """

    def __init__(
        self,
        schema: BatchSchema | None = None,
        samples: int = 4,
        layers: Sequence[str] | None = None,
        every_n_epochs: int = 1,
        max_tokens: int = 192,
        frames: Frames = "head",
    ) -> None:
        super().__init__(schema, every_n_epochs)
        self.samples = at_least("samples", samples, 1)
        self.layers = None if layers is None else name_list("layers", layers)
        self.max_tokens = at_least("max_tokens", max_tokens, 1)
        self.frames: Frames = one_of("frames", frames, FRAMES)
        self._recorder: QuietRecorder | None = None
        self._trainer: Trainer | None = None
        self._tokenizer: Any = None
        self._clear()

    def _start(self, trainer: Trainer, module: LightningModule) -> None:
        check_frames(self.frames, trainer, type(self).__name__)
        self._recorder = QuietRecorder(module, self.layers, self._draw, self._guard)
        self._trainer = trainer
        self._tokenizer = find_tokenizer(module, trainer)

    def _detach(self) -> None:
        super()._detach()
        self._recorder = self._tokenizer = self._trainer = None
        self._clear()

    def _clear(self) -> None:
        self._left = 0  # samples still to be seen
        self._seen: list[Sample] = []
        self._valid: Tensor | None = None
        self._pictures: dict[str, Future[Picture]] = {}

    def _begin(self, trainer: Trainer) -> None:
        self._left = self.samples if trainer.is_global_zero else 0
        self._epoch = trainer.current_epoch

    def _watch(self, batch: Any) -> AbstractContextManager[Any]:
        if self._left and self.schema.size(batch) is None:
            raise ValueError(
                "The number of samples in the batch is not known. Say what the model receives: BatchSchema(inputs=...)."
            )
        first = self.samples - self._left
        self._seen = [sample.numbered(first + sample.number) for sample in self._read(batch)]
        self._left -= len(self._seen)
        self._valid = self.schema.flags("valid", batch)
        self._batch_size = self.schema.size(batch)
        return self._recorder.watch() if self._recorder and self._seen else nullcontext()

    def _read(self, batch: Any) -> list[Sample]:
        return read_samples(self.schema, batch, self._tokenizer, self._left) if self._left else []

    def _finish(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_global_zero:
            with self._guarded():
                log_point(trainer, self._writer, self._folder, self._pictures)
        self._clear()

    def _draw(self, call: AttentionCall) -> None:
        call = known_tokens(call, self._valid)
        step = maps_per_sample(call.shape[0], self._batch_size)  # of several maps, as in windows, the first is shown
        shown = self._seen if step else []
        asked = [self._asked(call.select(n * step), sample, step == 1) for n, sample in enumerate(shown)]
        copies = to_host([tensor for tensors in asked for tensor in tensors])
        for sample, tensors in zip(shown, asked, strict=True):
            (maps, queries, keys, *relevance), copies = copies[: len(tensors)], copies[len(tensors) :]
            tag = f"attention/sample_{sample.number}/{call_name(call)}"
            title = f"{call_name(call)}, sample {sample.number}, epoch {self._epoch}"
            colours = self._colours(call_name(call), len(maps))
            self._pictures[tag] = self._heads(_Copies(maps, queries, keys, call.is_cross), sample, title, colours)
            if relevance and sample.image is not None:
                draw = partial(overlay, sample.image, relevance[0].numpy(), title=title)
                self._pictures[f"{tag}/image"] = self._writer.submit(draw, sample.image.nbytes)

    def _asked(self, call: AttentionCall, sample: Sample, is_whole: bool) -> list[Tensor]:
        """What is drawn of one sample's call: maps, pooled if long, which tokens are real, and what lies on the image.

        All of it stays on the device, and is no larger than what is drawn.
        """
        _, _, queries, keys = call.shape
        if max(queries, keys) > self.max_tokens:
            maps = call.bucketed_weights(min(queries, self.max_tokens), min(keys, self.max_tokens))
        else:
            maps = call.weights()
        asked = [maps[0], call.query_valid[0], call.key_valid[0]]
        return [*asked, *_relevance(call, sample.image)] if is_whole and not call.is_cross else asked

    def _colours(self, layer: str, heads: int) -> Array | None:
        if self.frames == "head" or self._trainer is None:
            return None
        return frame_colours(self.frames, self._trainer, [(layer, head) for head in range(heads)])

    def _heads(self, copies: _Copies, sample: Sample, title: str, colours: Array | None) -> Future[Picture]:
        maps, rows, columns = self._map(copies, sample)
        # the same for every epoch, layer and head of a sample, so that a colour means the same weight in all of them
        high = min(1.0, 4 / math.sqrt(maps.shape[-1]))
        draw = partial(attention_heads, maps, colours=colours, title=title, high=high)
        draw = partial(draw, row_labels=rows, column_labels=columns)
        return self._writer.submit(draw, maps.nbytes)

    def _map(self, copies: _Copies, sample: Sample) -> tuple[Array, list[str] | None, list[str] | None]:
        """Maps of one sample ``(heads, queries, keys)`` without padding, and unless pooled the labels of its axes."""
        maps, queries, keys, is_cross = copies
        shown, seen = _buckets(queries, maps.shape[1]), _buckets(keys, maps.shape[2])
        drawn = maps[:, shown][:, :, seen].numpy()
        if maps.shape[1:] != (len(queries), len(keys)):
            return drawn, None, None
        return drawn, None if is_cross else sample.labels(shown), sample.labels(seen)


class _Copies(NamedTuple):
    """What was copied of one sample: its maps, which queries and keys are real, and whether they are other tokens."""

    maps: Tensor
    queries: Tensor
    keys: Tensor
    is_cross: bool


def _relevance(call: AttentionCall, image: Array | None) -> list[Tensor]:
    """Attention of the class token (without one, the mean over patches) as it lies on the image, if it does."""
    grid = None if image is None else patch_grid(call.shape[3], image.shape[0] / image.shape[1])
    if grid is None:
        return []
    rows, columns, prefix = grid
    weights = call.weights(torch.zeros(1, dtype=torch.long, device=call.device) if prefix else None)
    return [weights[0].mean(dim=(0, 1))[prefix:].view(rows, columns)]


def _buckets(valid: Tensor, buckets: int) -> Tensor:
    """Which of the buckets that ``valid (tokens,)`` was pooled into hold a token and not only padding."""
    bucket = torch.arange(len(valid)) * buckets // len(valid)
    return torch.bincount(bucket[valid], minlength=buckets) > 0
