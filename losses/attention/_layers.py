"""What the attention losses share: layers in, one number out; rows, samples and layers that do not count are left out.

A cost is averaged over the rows and heads of a sample that count, then over the layers in which the sample has any,
then over the samples that have any. So neither padding nor a sample without annotation moves a mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from losses._checks import accumulation_dtype, check_shape

__all__ = [
    "EMPTY_ROW",
    "Allowed",
    "allowed_keys",
    "as_layers",
    "check_valid",
    "layer_mean",
    "real_rows",
    "reduce_layers",
    "reduce_samples",
]

EMPTY_ROW = 2.0**-20  # a row whose weights on valid keys sum to less attends to nothing


def as_layers(weights: Tensor | Sequence[Tensor], name: str = "weights") -> list[Tensor]:
    """Return the layers as a list, after checking that they go together.

    Args:
        weights: Attention weights of one layer or of several; heads and queries may differ between layers.
        name: What an error calls them.

    Shape:
        - weights: ``(batch, heads, queries, keys)`` each

    Raises:
        ValueError: If there is no layer, or a shape does not fit.
        TypeError: If a layer is no tensor.
    """
    layers = [weights] if isinstance(weights, Tensor) else list(weights)
    if not layers:
        raise ValueError(f"`{name}` holds no layer: the model returned no attention weights. Capture them instead.")
    for index, layer in enumerate(layers):
        if not isinstance(layer, Tensor):
            raise TypeError(f"`{name}[{index}]` must be a tensor, got {type(layer).__name__}.")
        if layer.dim() != 4:
            shape = tuple(layer.shape)
            raise ValueError(f"`{name}[{index}]` must have 4 axes (batch, heads, queries, keys), got shape {shape}.")
        check_shape(f"{name}[{index}]", layer[:, 0, 0], (layers[0].shape[0], layers[0].shape[3]), "(batch, keys)")
    return layers


def check_valid(valid: Tensor | None, layer: Tensor) -> Tensor | None:
    """Return ``valid`` as a boolean ``(batch, keys)``, after checking its shape against ``layer``."""
    if valid is None:
        return None
    check_shape("valid", valid, (layer.shape[0], layer.shape[3]), "(batch, keys)")
    return valid != 0


def real_rows(layer: Tensor, valid: Tensor | None) -> Tensor | None:
    """Return which rows are those of real tokens, ``(batch, 1, queries)``; ``None``: all, or it cannot be known.

    In self-attention queries are the tokens that keys are, so ``valid`` tells; in cross-attention it does not.
    """
    if valid is None or layer.shape[2] != layer.shape[3]:
        return None
    return valid[:, None, :]


class Allowed(NamedTuple):
    """Which keys each row of a layer may attend to."""

    keys: Tensor | None  # (batch or 1, heads or 1, queries or 1, keys), True = may attend; None: all
    number: Tensor  # how many they are, broadcastable to (batch, heads, queries), in the dtype of sums over weights
    rows: Tensor  # rows of real tokens that have a choice, at least two keys; broadcastable to (batch, heads, queries)


def allowed_keys(valid: Tensor | None, layer: Tensor) -> Allowed:
    """Return which keys of ``layer`` count, from a key mask or from a mask of query-key pairs.

    Args:
        valid: ``True`` for real tokens, or where a query may attend; ``None`` allows every pair.
        layer: Attention weights of one layer.

    Shape:
        - valid: ``(batch, keys)``, or ``(batch or 1, heads or 1, queries, keys)``
        - layer: ``(batch, heads, queries, keys)``

    Raises:
        ValueError: If the shape of ``valid`` does not fit.
    """
    dtype = accumulation_dtype(layer)
    if valid is None:
        number = torch.full((1, 1, 1), layer.shape[3], dtype=dtype, device=layer.device)
        return Allowed(None, number, number > 1)
    if isinstance(valid, Tensor) and valid.dim() == 4:
        (batch, heads), (queries, keys) = valid.shape[:2], layer.shape[2:]
        if batch not in (1, layer.shape[0]) or heads not in (1, layer.shape[1]) or valid.shape[2:] != (queries, keys):
            raise ValueError(
                f"`valid` must have shape (batch or 1, heads or 1, queries, keys) = {tuple(layer.shape)}, got "
                f"{tuple(valid.shape)}."
            )
        pairs = valid != 0
        number = pairs.sum(dim=-1, dtype=dtype)
        return Allowed(pairs, number, number > 1)
    check_shape("valid", valid, (layer.shape[0], layer.shape[3]), "(batch, keys)")
    real = valid != 0
    number = real.sum(dim=-1, dtype=dtype)[:, None, None]
    rows = real_rows(layer, real)
    return Allowed(real[:, None, None, :], number, number > 1 if rows is None else rows & (number > 1))


def layer_mean(cost: Tensor, counted: Tensor, row_weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Average a layer's cost over what counts.

    Args:
        cost: Cost of each row; finite everywhere, also where it does not count.
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
