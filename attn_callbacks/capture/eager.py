"""Attention that a model computes itself: a softmax over keys whose result is multiplied with the values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_callbacks.capture.call import AttentionCall

__all__ = ["PRODUCTS", "SOFTMAXES", "SoftmaxWatch", "four_axes"]

SOFTMAXES = frozenset({F.softmax, torch.softmax, torch.special.softmax, Tensor.softmax})
PRODUCTS = frozenset({torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.einsum})
_DROPOUTS = frozenset({F.dropout, torch.dropout, nn.functional.alpha_dropout})
_HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads")
_KEPT = 4  # softmax results that may wait for their product; a model uses one right away


class SoftmaxWatch:
    """Follow the results of softmax until a product with values shows that they were attention weights.

    A gate or a classifier also takes a softmax over the last axis; only a product with a second tensor that has the
    same batch axes makes it attention.
    """

    def __init__(self, emit: Callable[[AttentionCall], None]) -> None:
        self._emit = emit
        self._waiting: list[tuple[Tensor, AttentionCall]] = []

    @property
    def pending(self) -> bool:
        """Some softmax waits for its product."""
        return bool(self._waiting)

    def made(self, output: Tensor, scores: Tensor, dim: int | None = None, *_: Any, **__: Any) -> None:
        """Remember a softmax over the last axis of at least three."""
        if scores.ndim >= 3 and dim in (-1, scores.ndim - 1):
            self._wait(output, AttentionCall(name="", scores=scores))

    def forget(self, weights: Tensor) -> None:
        """Drop ``weights`` from what is followed."""
        self._waiting = [(tensor, call) for tensor, call in self._waiting if tensor is not weights]

    def used(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, module: Any) -> None:
        """See what a function did with the results that wait."""
        operands = [operand for operand in (*args, *kwargs.values()) if isinstance(operand, Tensor)]
        if func is torch.einsum and len(args) == 2 and isinstance(args[1], (list, tuple)):
            operands = list(args[1])
        position, call = self._find(operands)
        if call is None:
            return
        if func in PRODUCTS:
            others = operands[:position] + operands[position + 1 :]
            if others and (func is torch.einsum or _same_batch(operands[position], others[0], position)):
                self.forget(operands[position])
                self._emit(_by_head(call, module))
        elif isinstance(output, Tensor) and output is not operands[position]:
            self._follow(func, operands[position], call, output)

    def _follow(self, func: Any, weights: Tensor, call: AttentionCall, output: Tensor) -> None:
        if output.shape == weights.shape:  # dropout, a cast: the weights of interest are the ones before
            self._wait(output, call)
        elif func is Tensor.__getitem__ and output.ndim == weights.ndim:  # a virtual sink key was cut off
            self._wait(output, AttentionCall(name="", recorded=output))

    def _wait(self, weights: Tensor, call: AttentionCall) -> None:
        self._waiting = [*self._waiting[1 - _KEPT :], (weights, call)]

    def _find(self, operands: list[Tensor]) -> tuple[int, AttentionCall | None]:
        for position, operand in enumerate(operands):
            for weights, call in reversed(self._waiting):
                if operand is weights:
                    return position, call
        return -1, None


def four_axes(tensor: Tensor) -> Tensor:
    """View ``(..., heads, queries, n)`` as ``(batch, heads, queries, n)``; three axes are a batch of one head."""
    if tensor.ndim == 3:
        return tensor[:, None]
    return tensor if tensor.ndim == 4 else tensor.flatten(0, -4)


def _same_batch(weights: Tensor, values: Tensor, position: int) -> bool:
    return position == 0 and values.ndim == weights.ndim and values.shape[-2] == weights.shape[-1]


def _by_head(call: AttentionCall, module: Any) -> AttentionCall:
    field = "scores" if call.scores is not None else "recorded"
    seen: Tensor = getattr(call, field)
    if seen.ndim == 3:  # (batch * heads, queries, keys) or a single head: the module says how many
        heads = next((getattr(module, n) for n in _HEAD_COUNTS if isinstance(getattr(module, n, None), int)), 1)
        split = heads if heads > 0 and len(seen) % heads == 0 else 1
        return AttentionCall(name="", **{field: seen.reshape(-1, split, *seen.shape[1:])})
    return AttentionCall(name="", **{field: four_axes(seen)})
