"""AttentionPaths: which inputs a token, or a decision, came from, through all layers and single heads."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from attn_callbacks._checks import at_least, integer, name_list, one_of
from attn_callbacks._lightning import rank_zero_warn
from attn_callbacks.batch import BatchSchema
from attn_callbacks.callbacks._bias_names import is_sharded
from attn_callbacks.callbacks._layers import known_tokens
from attn_callbacks.callbacks._loggers import can_log, log_point
from attn_callbacks.callbacks._observer import ValidationObserver
from attn_callbacks.callbacks._paths_gradients import GradientMaps, Target, token_position
from attn_callbacks.callbacks._paths_maps import LayerMaps, SampleMaps, one_stack, read_layer, sample_maps
from attn_callbacks.callbacks._paths_result import AttentionPathsResult, TracedSample, trace
from attn_callbacks.callbacks._samples import Sample, find_tokenizer, place_names, read_samples, sample_grid
from attn_callbacks.callbacks._watch import QuietRecorder
from attn_callbacks.capture import AttentionCall
from attn_callbacks.render import Picture, overlay
from attn_callbacks.render.paths import token_paths
from attn_callbacks.render.strip import token_strip

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["AttentionPaths"]

Method = Literal["rollout", "relevance", "gradient_rollout"]

_METHODS: tuple[Method, ...] = ("rollout", "relevance", "gradient_rollout")


class AttentionPaths(ValidationObserver):
    """Follow attention through all layers, back from one token to the inputs, on fixed validation samples.

    An observer: training is bit-identical with and without it. ``paths/<method>/<sample>/tokens`` draws the sample's
    text with every token in the colour of what it gave, ``paths/<method>/<sample>/paths`` the strongest paths through
    single heads, and for images ``paths/<method>/<sample>/image`` lays what patches gave over the image.
    :attr:`result` keeps the numbers, also without a logger.

    ``"rollout"`` multiplies attention maps of the normal validation pass and knows of no class. ``"relevance"`` (Chefer
    et al.) and ``"gradient_rollout"`` ask what speaks for one class: the network runs again on the samples, with
    gradients, in eval mode, in the precision of its weights; no parameter gets a gradient. That takes a forward which
    gets the batch's inputs as they are and returns logits, and on several processes parameters that are not sharded.

    Of an encoder-decoder the encoder is followed, unless ``layers`` names the self-attention of the decoder.

    Args:
        schema: Where a batch has what; the default reads ``(x, y)`` and Hugging Face batches.
        samples: Number of samples, the first ones of the first validation loader.
        method: ``"rollout"``, ``"relevance"`` or ``"gradient_rollout"``.
        target: Class whose logit is explained: ``"predicted"``, ``"label"`` or a number. ``"rollout"`` has none.
        token: Token that is asked about, counted without padding: 0 is the class token, -1 the last. ``None`` takes the
            mean over all, without paths. Samples without it are left out. Of a language model, its logits.
        paths: Number of paths.
        layers: Names or glob patterns of attention modules; ``None`` takes all.
        every_n_epochs: Look after every n-th epoch.
        max_tokens: Longest sequence, with padding. A sample takes layers x heads x tokens x tokens numbers.

    Raises:
        ValueError: If a number is too small, or ``method`` or ``target`` is another word.
        TypeError: If ``layers`` is a single string.

    Example:
        >>> AttentionPaths(samples=2, method="relevance")
        AttentionPaths(samples=2, method='relevance')
    """

    _needs_logger = False  # the result is there without one

    def __init__(
        self,
        schema: BatchSchema | None = None,
        samples: int = 4,
        method: Literal["rollout", "relevance", "gradient_rollout"] = "rollout",
        target: int | Literal["predicted", "label"] = "predicted",
        token: int | None = 0,
        paths: int = 16,
        layers: Sequence[str] | None = None,
        every_n_epochs: int = 1,
        max_tokens: int = 256,
    ) -> None:
        super().__init__(schema, every_n_epochs)
        self.samples = at_least("samples", samples, 1)
        self.method: Method = one_of("method", method, _METHODS)
        if isinstance(target, str):
            one_of("target", target, ("predicted", "label"))
        self.target: Target = target if isinstance(target, str) else at_least("target", target, 0)
        self.token = None if token is None else integer("token", token)
        self.paths = at_least("paths", paths, 1)
        self.layers = None if layers is None else name_list("layers", layers)
        self.max_tokens = at_least("max_tokens", max_tokens, 1)
        self.result: AttentionPathsResult | None = None
        self._recorder: QuietRecorder | None = None
        self._gradients: GradientMaps | None = None
        self._tokenizer: Any = None
        self._told = self._draws = False
        self._clear()

    def _start(self, trainer: Trainer, module: LightningModule) -> None:
        self.result, self._told = None, False
        self._tokenizer = find_tokenizer(module, trainer)
        if self.method == "rollout":
            self._recorder = QuietRecorder(module, self.layers, self._receive, self._guard)
        elif is_sharded(trainer):
            rank_zero_warn(
                f"`AttentionPaths` cannot run a network again whose parameters are sharded, as `{self.method}` has to, "
                "and stays inert. Use method='rollout'."
            )
        else:
            self._gradients = GradientMaps(module, self.layers, self.schema, self.target, self.token, self.max_tokens)

    def _detach(self) -> None:
        super()._detach()
        self._recorder = self._gradients = self._tokenizer = None
        self._clear()

    def _clear(self) -> None:
        self._left = 0  # samples still to be seen
        self._seen: list[Sample] = []
        self._valid: Tensor | None = None
        self._layers: list[LayerMaps] = []  # of the batch being looked at
        self._traced: list[TracedSample] = []
        self._names: tuple[str, ...] = ()
        self._pictures: dict[str, Future[Picture]] = {}

    def _begin(self, trainer: Trainer) -> None:
        looks = trainer.is_global_zero and (self._recorder is not None or self._gradients is not None)
        self._left = self.samples if looks else 0
        self._epoch, self._draws = trainer.current_epoch, can_log(trainer)

    def _watch(self, batch: Any) -> AbstractContextManager[Any]:
        size = self.schema.size(batch)
        if self._left and size is None:
            raise ValueError(
                "The number of samples in the batch is not known. Say what the model receives: BatchSchema(inputs=...)."
            )
        first = self.samples - self._left
        read = read_samples(self.schema, batch, self._tokenizer, self._left) if self._left else []
        self._seen, self._layers = [sample.numbered(first + sample.number) for sample in read], []
        self._left -= len(self._seen)
        self._valid, self._size = self.schema.flags("valid", batch), size
        if not self._seen:
            return nullcontext()
        return self._gradients.watch(batch) if self._gradients is not None else self._recorded()

    def _recorded(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._recorder is None else self._recorder.watch()

    def _receive(self, call: AttentionCall) -> None:
        call = known_tokens(call, self._valid)
        self._layers.append(read_layer(call, len(self._seen), self._size, self.max_tokens))

    def _add(self, outputs: Any, batch: Any) -> None:
        seen, self._seen = self._seen, []
        targets: list[int | None] = [None] * len(seen)
        if not seen:
            return
        with self._guarded():
            if self._gradients is not None:
                self._layers, targets[:] = self._gradients.read(batch, len(seen))
            stack, self._layers = one_stack(self._layers, chosen=self.layers is not None), []
            self._names = tuple(layer.name for layer in stack)
            for place, (sample, target) in enumerate(zip(seen, targets, strict=True)):
                self._trace(sample, target, sample_maps(stack, place))

    def _trace(self, sample: Sample, target: int | None, maps: SampleMaps) -> None:
        place = None if self.token is None else token_position(maps.real, self.token)
        if not maps.real.any() or (self.token is not None and place is None):
            self._leave_out(sample, int(maps.real.sum()))
            return
        token = None if place is None else int(maps.real[:place].sum())
        values, paths = trace(maps, self.method, token, self.paths)
        self._tell_if_alone(token, values)
        labels = (None if maps.is_decoder else sample.labels(maps.real)) or place_names(
            sample_grid(sample, maps.real), maps.real
        )
        with torch.inference_mode(False):  # for whoever computes with it later
            values = values.clone()
        found = TracedSample(sample.number, tuple(labels), token, target, values, paths)
        self._traced.append(found)
        if self._draws:
            self._draw(found, sample, maps.real)

    def _tell_if_alone(self, token: int | None, values: Tensor) -> None:
        if token == 0 and len(values) > 1 and not bool(values[1:].any()) and not self._told:
            self._told = True
            rank_zero_warn(
                "`AttentionPaths` asks about the first token, which sees itself alone, as in causal attention. Pass "
                "`token=-1` for the last one."
            )

    def _leave_out(self, sample: Sample, tokens: int) -> None:
        if not self._told:
            self._told = True
            rank_zero_warn(
                f"`AttentionPaths` leaves out sample {sample.number}, and all like it: `token` is {self.token}, and it "
                f"has {tokens} tokens."
            )

    def _draw(self, found: TracedSample, sample: Sample, real: Tensor) -> None:
        tag, title = f"paths/{self.method}/sample_{found.number}", self._title(found)
        values, grid = found.values.numpy(), sample_grid(sample, real)
        if sample.image is not None and grid is not None:
            patches = values[grid[2] :].reshape(grid[:2])
            draw = partial(overlay, sample.image, patches, title=title)
            self._pictures[f"{tag}/image"] = self._writer.submit(draw, sample.image.nbytes)
        else:
            draw = partial(token_strip, values, found.labels, target=found.token, title=title)
            self._pictures[f"{tag}/tokens"] = self._writer.submit(draw, values.nbytes)
        if found.paths:
            draw = partial(_drawn_paths, found, title)
            self._pictures[f"{tag}/paths"] = self._writer.submit(draw)

    def _title(self, found: TracedSample) -> str:
        about = "" if found.target is None else f" for class {found.target}"
        return f"{self.method}{about}, sample {found.number}, epoch {self._epoch}"

    def _finish(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_global_zero and not self._guard.off:
            with self._guarded():
                if self._traced:
                    self.result = AttentionPathsResult(self.method, self._epoch, self._names, tuple(self._traced))
                log_point(trainer, self._writer, self._folder, self._pictures)
        self._clear()


def _drawn_paths(found: TracedSample, title: str) -> Picture:
    # with gradients the residual connections alone outweigh everything, and say nothing
    through_heads = [path for path in found.paths if found.target is None or set(path.heads) != {None}]
    paths = through_heads or found.paths
    tokens = np.array([path.tokens for path in paths])
    heads = np.array([[-1 if head is None else head for head in path.heads] for path in paths])
    weights = np.array([path.weight for path in paths])
    return token_paths(tokens, heads, weights, labels=found.labels, count=len(found.labels), title=title)
