"""Attention that a model computes itself: a softmax over keys whose result is multiplied with the values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_callbacks.capture.call import AttentionCall
from attn_callbacks.capture.fused import four_axes

__all__ = ["SOFTMAXES", "SoftmaxWatch", "share_memory"]

SOFTMAXES = frozenset({F.softmax, torch.softmax, torch.special.softmax, Tensor.softmax})
_PRODUCTS = frozenset({torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm})
_HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads")
_KEPT = 4  # softmax results that may wait for their product; a model uses one right away


@dataclass(eq=False)
class _Softmax:
    scores: Tensor | None  # None once some keys were cut off: then only the weights are known

    def source(self, weights: Tensor) -> Tensor:
        return weights if self.scores is None else self.scores


class SoftmaxWatch:
    """Follow the results of softmax until a product with values shows that they were attention weights.

    A gate or a classifier also takes a softmax over the last axis; only a product that sums over that axis, with a
    second tensor of the same batch that knows nothing of the queries, makes it attention.

    Args:
        emit: Receives each call, and the weights that the model multiplied with its values; what it returns takes the
            place of the call's output.
    """

    def __init__(self, emit: Callable[[AttentionCall, Tensor], Tensor | None]) -> None:
        self._emit = emit
        self._waiting: list[tuple[Tensor, _Softmax]] = []

    @property
    def pending(self) -> bool:
        """Some softmax waits for its product."""
        return bool(self._waiting)

    def made(self, output: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember a softmax over the last axis of at least three."""
        given = {**dict(zip(("input", "dim"), args, strict=False)), **kwargs}
        scores, dim = given["input"], given.get("dim")
        if scores.ndim >= 3 and dim in (-1, scores.ndim - 1):
            self._wait(output, _Softmax(scores))

    def used(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, modules: Iterable[nn.Module]
    ) -> Any:
        """See what a function did with the results that wait, inside ``modules``; return what it shall have returned.

        Args:
            func: The function.
            args: Its arguments.
            kwargs: Its named arguments.
            output: What it returned.
            modules: The executing modules, innermost first.
        """
        operands = [operand for operand in (*args, *kwargs.values()) if isinstance(operand, Tensor)]
        if func is torch.einsum and len(args) == 2 and isinstance(args[1], (list, tuple)):
            operands = list(args[1])
        position, softmax = self._find(operands)
        if softmax is None or not isinstance(output, Tensor):
            return output
        weights = operands[position]
        if func is torch.einsum:
            attends = isinstance(args[0], str) and _einsum_attends(args[0], position)
        else:
            attends = func in _PRODUCTS and _product_attends(operands, position)
        if attends:
            self.forget(weights)
            # the product, unless its axes may come in another order: weights may take much more memory to hold
            keeps_axes = func in _PRODUCTS and output.shape[:-1] == weights.shape[:-1]
            used = output if keeps_axes else weights
            changed = self._emit(_call(softmax, _by_head(softmax.source(weights), modules), used), weights)
            if changed is not None:
                return changed if keeps_axes else func(*_replaced(args, weights, changed), **kwargs)
        elif output is not weights:
            self._follow(func, weights, softmax, output)
        return output

    def forget(self, weights: Tensor) -> None:
        """Drop the softmax that ``weights`` came from, also where a dropout or a view of it waits."""
        found = [softmax for waiting, softmax in self._waiting if share_memory(waiting, weights)]
        self._waiting = [entry for entry in self._waiting if entry[1] not in found]

    def _follow(self, func: Any, weights: Tensor, softmax: _Softmax, output: Tensor) -> None:
        same_maps = output.numel() == weights.numel() and output.shape[-2:] == weights.shape[-2:]
        if same_maps:  # dropout, a cast, heads folded into the batch: the weights of interest are the ones before
            self._wait(output, softmax)
        elif func is Tensor.__getitem__ and output.ndim == weights.ndim:  # a virtual sink key was cut off
            self._wait(output, _Softmax(None))

    def _wait(self, weights: Tensor, softmax: _Softmax) -> None:
        self._waiting = [*self._waiting[1 - _KEPT :], (weights, softmax)]

    def _find(self, operands: list[Tensor]) -> tuple[int, _Softmax | None]:
        for position, operand in enumerate(operands):
            for weights, softmax in reversed(self._waiting):
                if operand is weights:
                    return position, softmax
        return -1, None


def _call(softmax: _Softmax, source: Tensor, output: Tensor) -> AttentionCall:
    if softmax.scores is None:
        return AttentionCall(name="", recorded=source, output=output)
    return AttentionCall(name="", scores=source, output=output)


def _replaced(args: tuple[Any, ...], old: Tensor, new: Tensor) -> Iterator[Any]:
    """Put another tensor in the place of one argument, also inside the list of `torch.einsum`."""
    for argument in args:
        if isinstance(argument, (list, tuple)):
            yield [new if entry is old else entry for entry in argument]
        else:
            yield new if argument is old else argument


def share_memory(tensor: Tensor, other: Tensor) -> bool:
    """Tell whether one tensor is the other, or a view of it."""
    return tensor is other or tensor.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _product_attends(operands: list[Tensor], position: int) -> bool:
    """``weights @ values`` with values that have the axes of the weights, one value a key."""
    weights, others = operands[position], operands[position + 1 :]
    return position == 0 and bool(others) and others[0].ndim == weights.ndim


def _einsum_attends(equation: str, position: int) -> bool:
    """The equation sums over the keys of its operand, batch for batch, and leaves its queries to it alone."""
    inputs, _, output = equation.replace(" ", "").replace("...", ".").partition("->")
    terms = inputs.split(",")
    weights, others = terms[position], "".join(terms[:position] + terms[position + 1 :])
    if len(weights) < 2:  # an ellipsis alone
        return False
    query, key = weights[-2], weights[-1]
    result = output if "->" in equation else "".join(axis for axis in inputs if inputs.count(axis) == 1)
    return key in others and key not in result and query not in others and query in result and weights[0] in others


def _by_head(maps: Tensor, modules: Iterable[nn.Module]) -> Tensor:
    """Give scores or weights four axes."""
    if maps.ndim != 3:
        return four_axes(maps)
    # (batch * heads, queries, keys), or one head: the module says how many
    counts = (getattr(module, name, None) for module in modules for name in _HEAD_COUNTS)
    heads = next((count for count in counts if isinstance(count, int) and count > 0), 1)
    return maps.reshape(-1, heads if len(maps) % heads == 0 else 1, *maps.shape[1:])
