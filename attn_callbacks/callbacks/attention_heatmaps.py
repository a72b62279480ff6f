"""AttentionHeatmaps: where every head looks on the same few samples, epoch by epoch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from attn_callbacks._checks import at_least
from attn_callbacks.batch import BatchSchema
from attn_callbacks.callbacks._layers import call_name, known_tokens
from attn_callbacks.callbacks._loggers import log_pictures, run_folder
from attn_callbacks.callbacks._observer import ValidationObserver
from attn_callbacks.callbacks._samples import Sample, patch_grid, read_samples
from attn_callbacks.callbacks._watch import QuietRecorder
from attn_callbacks.capture import AttentionCall
from attn_callbacks.render import Picture, attention_heads, overlay

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["AttentionHeatmaps"]

Array = np.ndarray[Any, Any]


class AttentionHeatmaps(ValidationObserver):
    """Draw the attention of every head on fixed validation samples after each validation.

    An observer: training is bit-identical with and without it. One picture a sample and layer,
    ``attention/<sample>/<layer>``: all heads side by side, each in a frame of its own colour, with token labels where
    they fit. For image models, ``attention/<sample>/<layer>/image`` lays the attention of the class token (without
    one, the mean over patches) over the image. Taken in eval mode inside the normal validation pass. Text is shown
    without padding; sequences longer than ``max_tokens`` are pooled, so that rows still sum to one.

    The samples are the first ones of the first validation loader: the same every time unless it shuffles. Token ids
    become text where the module or the data module has a ``tokenizer``.

    Args:
        schema: Where a batch has what; the default reads ``(x, y)`` and Hugging Face batches.
        samples: Number of samples.
        layers: Names or glob patterns of attention modules; ``None`` takes all.
        every_n_epochs: Draw after every n-th epoch.
        max_tokens: Longest side of a map; longer ones are pooled to it.

    Raises:
        ValueError: If a number is below 1.

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
    ) -> None:
        super().__init__(schema, every_n_epochs)
        self.samples = at_least("samples", samples, 1)
        self.layers = None if layers is None else tuple(layers)
        self.max_tokens = at_least("max_tokens", max_tokens, 1)
        self._left = 0

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Take samples from the first loader only."""
        self._left = 0 if dataloader_idx else self._left

    def _start(self, trainer: Trainer, module: LightningModule) -> None:
        self._module = module
        self._tokenizer = _tokenizer(module, trainer)
        self._recorder = QuietRecorder("AttentionHeatmaps", self._draw, self.layers)
        self._pictures: dict[str, Picture] = {}

    def _detach(self) -> None:
        super()._detach()
        self._left = 0
        for name in ("_module", "_tokenizer", "_recorder", "_pictures", "_wanted", "_valid"):
            vars(self).pop(name, None)  # a run's tensors do not outlive it

    def _begin(self, trainer: Trainer) -> None:
        self._left = self.samples if trainer.is_global_zero else 0
        self._epoch, self._pictures = trainer.current_epoch, {}

    def _around(self, batch: Any) -> AbstractContextManager[Any]:
        if not self._due or not self._left:
            return nullcontext()
        found = read_samples(self.schema, batch, self._tokenizer, self._left)
        first = self.samples - self._left
        self._wanted = [sample.numbered(first + sample.number) for sample in found]
        self._left -= len(found)
        self._valid = self.schema.flags("valid", batch)
        self._batch_size = self.schema.size(batch) or 1
        return self._recorder.watch(self._module) if found else nullcontext()

    def _finish(self, trainer: Trainer) -> None:
        folder = run_folder(trainer)
        if trainer.is_global_zero:
            log_pictures(trainer, self._pictures, folder)
        self._left, self._pictures = 0, {}

    def _draw(self, call: AttentionCall) -> None:
        call = known_tokens(call, self._valid)
        windows = call.shape[0] // self._batch_size  # attention in windows has several maps a sample: the first is shown
        for position, sample in enumerate(self._wanted):
            one = call.select(position * windows)
            tag = f"attention/sample_{sample.number}/{call_name(call)}"
            maps, rows, columns = self._map(one, sample)
            title = f"{call_name(call)}, sample {sample.number}, epoch {self._epoch}"
            self._pictures[tag] = attention_heads(maps, row_labels=rows, column_labels=columns, title=title)
            if sample.image is not None and windows == 1 and not call.is_cross:
                self._lay_over(f"{tag}/image", one, sample.image)

    def _map(self, call: AttentionCall, sample: Sample) -> tuple[Array, list[str] | None, list[str] | None]:
        """Maps of one sample ``(heads, queries, keys)`` without padding, pooled if long, and the labels of its axes."""
        _, _, queries, keys = call.shape
        if max(queries, keys) > self.max_tokens:
            pooled = call.bucketed_weights(min(queries, self.max_tokens), min(keys, self.max_tokens))
            return pooled[0].cpu().numpy(), None, None
        shown, seen = call.query_valid[0].cpu(), call.key_valid[0].cpu()
        maps = call.weights()[0].cpu()[:, shown][:, :, seen]
        rows = None if call.is_cross else sample.labels(shown)
        return maps.numpy(), rows, sample.labels(seen)

    def _lay_over(self, tag: str, call: AttentionCall, image: Array) -> None:
        grid = patch_grid(call.shape[3], image.shape[0] / image.shape[1])
        if grid is None:
            return
        rows, columns, prefix = grid
        weights = call.weights(torch.zeros(1, dtype=torch.long, device=call.device) if prefix else None)
        relevance = weights[0].mean(dim=(0, 1))[prefix:].view(rows, columns)
        self._pictures[tag] = overlay(image, relevance.cpu().numpy())


def _tokenizer(module: Any, trainer: Any) -> Any:
    """Whoever holds the tokenizer, if anybody does: the module or the data module."""
    owners = (module, getattr(trainer, "datamodule", None))
    return next((owner.tokenizer for owner in owners if hasattr(owner, "tokenizer")), None)
