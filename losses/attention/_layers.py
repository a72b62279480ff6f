"""What the attention losses share: layers in, one number out; rows, samples and layers that do not count are left out.

A cost is averaged over the rows and heads of a sample that count, then over the layers in which the sample has any,
then over the samples that have any. So neither padding nor a sample without annotation moves a mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from losses._checks import check_shape, check_tensor

__all__ = ["as_layers", "layer_mean", "reduce_layers", "reduce_samples", "widened"]

_LARGEST_HALF = torch.finfo(torch.float16).max


def as_layers(weights: Tensor | Sequence[Tensor], name: str = "weights") -> list[Tensor]:
    """Return the layers as a list, after checking that they go together.

    Args:
        weights: Attention weights of one layer or of several; heads and queries may differ between layers.
        name: What an error calls them.

    Shape:
        - weights: ``(batch, heads, queries, keys)`` each

    Raises:
        ValueError: If there is no layer, or a shape does not fit.
        TypeError: If a layer is no floating tensor.
    """
    if not isinstance(weights, Iterable):
        raise TypeError(
            f"`{name}` must be a tensor or a list of tensors, one a layer, got {type(weights).__name__}. Capture the "
            "weights where the model returns none."
        )
    layers = [weights] if isinstance(weights, Tensor) else list(weights)
    if not layers:
        raise ValueError(f"`{name}` holds no layer: the model returned no attention weights. Capture them instead.")
    for index, layer in enumerate(layers):
        _check_layer(f"{name}[{index}]", layer)
        check_shape(f"{name}[{index}]", layer[:, 0, 0], (layers[0].shape[0], layers[0].shape[3]), "(batch, keys)")
    return layers


def widened(layer: Tensor) -> Tensor:
    """Return ``layer`` in float32 if it is in half precision; every loss computes there.

    On its way back to float16 the gradient is cut at the largest number there is: that of a logarithm at a weight of
    zero is larger, and infinite it would make NaN of everything.
    """
    if layer.dtype == torch.float16:
        wide: Tensor = _Widened.apply(layer)  # type: ignore[no-untyped-call]
        return wide
    return layer.float() if layer.dtype == torch.bfloat16 else layer


def layer_mean(cost: Tensor, counted: Tensor, row_weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Average a layer's cost over what counts.

    Args:
        cost: Cost of each row.
        counted: ``True`` for rows that count.
        row_weight: How much each of them counts, not negative; ``None`` means one.

    Shape:
        - cost: ``(batch, heads, rows)``
        - counted, row_weight: broadcastable to ``cost``
        - output: ``(batch,)`` mean, zero where nothing counts, and ``(batch,)`` whether anything does
    """
    counted = counted.expand_as(cost)
    cost = torch.where(counted, cost, 0.0)
    if row_weight is None:
        count = counted.sum(dim=(1, 2))
        return cost.sum(dim=(1, 2)) / count.clamp(min=1), count > 0
    share = torch.where(counted, row_weight, 0.0)
    total = share.sum(dim=(1, 2))
    return (cost * share).sum(dim=(1, 2)) / torch.where(total > 0, total, 1.0), total > 0


def reduce_layers(layers: Sequence[tuple[Tensor, Tensor]], present: Tensor | None, reduction: str) -> Tensor:
    """Average over layers, then reduce over samples; samples that are not present contribute zero.

    Args:
        layers: What :func:`layer_mean` returned for each layer.
        present: ``True`` for samples that carry the annotation; ``None`` means all.
        reduction: ``"mean"`` over the samples that count, ``"sum"`` or ``"none"``.

    Shape:
        - present: ``(batch,)``
        - output: scalar, or ``(batch,)`` for ``reduction="none"``
    """
    seen = torch.stack([counts for _, counts in layers])  # (layers, batch)
    cost = torch.stack([cost for cost, _ in layers]).sum(dim=0) / seen.sum(dim=0).clamp(min=1)
    return reduce_samples(cost, seen.any(dim=0) if present is None else seen.any(dim=0) & present, reduction)


def reduce_samples(cost: Tensor, counted: Tensor, reduction: str) -> Tensor:
    """Reduce the cost of each sample; those that do not count contribute zero.

    Args:
        cost: Cost of each sample.
        counted: ``True`` for samples that count.
        reduction: ``"mean"`` over the samples that count, ``"sum"`` or ``"none"``.

    Shape:
        - cost, counted: ``(batch,)``
        - output: scalar, or ``(batch,)`` for ``reduction="none"``
    """
    cost = torch.where(counted, cost, 0.0)
    if reduction == "none":
        return cost
    return cost.sum() if reduction == "sum" else cost.sum() / counted.sum().clamp(min=1)


def _check_layer(name: str, layer: Tensor) -> None:
    check_tensor(name, layer)
    if layer.dim() != 4:
        shape = tuple(layer.shape)
        raise ValueError(f"`{name}` must have 4 axes (batch, heads, queries, keys), got shape {shape}.")
    if 0 in layer.shape[1:]:
        raise ValueError(f"`{name}` must have at least one head, query and key, got shape {tuple(layer.shape)}.")
    if not layer.is_floating_point():
        raise TypeError(f"`{name}` must be a floating tensor, got {layer.dtype}.")


class _Widened(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(layer: Tensor) -> Tensor:
        return layer.float()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clamp(-_LARGEST_HALF, _LARGEST_HALF).half()
