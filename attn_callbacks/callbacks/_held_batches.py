"""Batches of a validation that are kept to run a network on them again, and the loss of each of their samples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_callbacks.batch import BatchSchema
from attn_callbacks.callbacks._class_labels import class_labels, label_complaint, pooled_strangers
from attn_callbacks.callbacks._forward import ForwardCall
from attn_callbacks.callbacks._reliance_probe import class_scores
from attn_callbacks.callbacks._substitute import substitute
from attn_callbacks.capture.compiled import run_eagerly

__all__ = ["HeldBatch", "complaint", "hold"]

Loss = Callable[[nn.Module, Any], Tensor]


class HeldBatch(ABC):
    """A batch whose losses can be computed anew.

    Args:
        strangers: What is known of labels that are no class, once losses were computed; see `class_labels`.
        classes: Number of classes, known by then.
    """

    strangers: Tensor | None = None
    classes = 0

    @abstractmethod
    def watch(self) -> AbstractContextManager[Any]:
        """Return what is to be entered around the step of the batch."""

    @abstractmethod
    def losses(self, module: nn.Module) -> Tensor:
        """Return one loss a sample, NaN for one that does not count. Call it outside of inference mode."""


def hold(batch: Any, module: nn.Module, schema: BatchSchema, loss: Loss | None) -> HeldBatch:
    """Keep a batch before its step.

    Args:
        batch: The batch.
        module: The module whose step it is.
        schema: Where the batch has what.
        loss: Computes losses from the module and the batch; ``None``: cross entropy of what ``forward`` returns, NaN
            where a label is negative or no class.

    Raises:
        ValueError: If the inputs are no tensor, or there are no labels, and there is no ``loss`` either.
    """
    if loss is not None:
        return _Given(batch, loss)
    inputs, target = schema.read("inputs", batch), schema.read("target", batch)
    if not isinstance(inputs, Tensor) or target is None:
        raise ValueError(
            "Cross entropy needs `inputs` that are a tensor, and labels. Say where they are: BatchSchema(inputs=..., "
            "target=...), or pass `loss`, a function of module and batch that returns one loss a sample."
        )
    return _CrossEntropy(_Again(module, inputs, trace=False), torch.as_tensor(target), schema)


def complaint(owner: str, held: Sequence[HeldBatch]) -> str | None:
    """Return what to say of labels that are no class, after losses were computed; ``None`` if there are none."""
    known = [(batch.strangers, batch.classes) for batch in held if batch.strangers is not None]
    if not known:
        return None
    return label_complaint(owner, pooled_strangers([strangers for strangers, _ in known]), known[0][1])


class _Given(HeldBatch):
    def __init__(self, batch: Any, loss: Loss) -> None:
        self._batch, self._loss = batch, loss
        self._copy: Any = None

    def watch(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def losses(self, module: nn.Module) -> Tensor:
        if self._copy is None:
            self._copy = _copied(self._batch)
        return self._loss(module, self._copy)


class _CrossEntropy(HeldBatch):
    def __init__(self, forward: _Again, target: Tensor, schema: BatchSchema) -> None:
        self._forward, self._target, self._schema = forward, target, schema

    @contextmanager
    def watch(self) -> Iterator[None]:
        with self._forward.watch():
            yield
        self._forward.outputs.clear()

    def losses(self, module: nn.Module) -> Tensor:
        output, target = self._forward.once_more(), self._target
        logits = self._schema.forward_logits([output])
        if logits is None and isinstance(output, Tensor) and output.ndim == 1:
            logits = output
        if logits is None or logits.ndim > 2 or target.ndim != 1 or len(target) != len(logits):
            shape = None if logits is None else tuple(logits.shape)
            raise ValueError(
                f"Cross entropy needs logits (samples, classes) and labels (samples,), got {shape} and "
                f"{tuple(target.shape)}. Pass `loss`, a function of module and batch that returns one loss a sample."
            )
        scores = class_scores(logits).float()
        target = target.detach().to(scores.device, copy=True)  # validation may have made it in its mode
        self.classes = scores.shape[1]
        labels, self.strangers = class_labels(target, self.classes)
        losses = F.cross_entropy(scores, labels.clamp_min(0), reduction="none")
        return losses.where(labels >= 0, torch.nan)


class _Again(ForwardCall):
    """A call that is made again many times, with copies of what it got: validation may have made that in its mode."""

    _copies: tuple[Any, Any] | None = None

    def once_more(self) -> Any:
        """Make the call and return what it returns."""
        if self._call is None:
            return self.again(self._inputs)  # says why there was none
        part, args, kwargs = self._call
        if self._copies is None:
            self._copies = _copied((args, kwargs))
        with run_eagerly(self._module):
            return part(*self._copies[0], **self._copies[1])


def _copied(whole: Any) -> Any:
    for tensor in _tensors(whole):
        whole = substitute(whole, tensor, tensor.detach().clone())
    return whole


def _tensors(whole: Any) -> list[Tensor]:
    if isinstance(whole, Tensor):
        return [whole]
    parts = whole.values() if isinstance(whole, Mapping) else whole if isinstance(whole, (list, tuple)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]
