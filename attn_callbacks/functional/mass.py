"""Attention mass on a set of keys, and its ratio to chance."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_callbacks._checks import check_axes

__all__ = ["attention_lift", "attention_mass", "target_share"]


def attention_mass(
    weights: Tensor, target_mask: Tensor, valid: Tensor | None = None, *, row_valid: Tensor | None = None
) -> Tensor:
    """Measure the share of each head's attention that falls on a set of keys.

    The weight of all rows on the set, cut to the valid keys, over their weight on the valid keys. Leave special tokens
    out of ``valid``: else a head that rests on them seems to ignore everything. Differentiable.

    Args:
        weights: Attention weights; a row of zeros adds nothing.
        target_mask: ``True`` for the keys of the set.
        valid: ``True`` for the keys to normalise over; ``None`` means all.
        row_valid: ``True`` for the rows that count, which is where padded queries are left out; ``None`` means all.

    Shape:
        - weights: ``(batch, heads, rows, keys)``
        - target_mask, valid: ``(batch, keys)``
        - row_valid: ``(batch, rows)``
        - output: ``(batch, heads)``, float32 in [0, 1], NaN where no mass falls on a valid key

    Raises:
        ValueError: If a shape does not fit.

    Example:
        >>> weights = torch.tensor([[[[0.5, 0.25, 0.25], [0.5, 0.5, 0.0]]]])
        >>> attention_mass(weights, torch.tensor([[False, True, False]]))
        tensor([[0.3750]])
        >>> attention_mass(weights, torch.tensor([[False, True, False]]), valid=torch.tensor([[False, True, True]]))
        tensor([[0.7500]])

    References:
        Wiegreffe and Pinter, "Attention is not not Explanation", 2019: mass is not reliance. Mask the set and measure
        the drop as well.
    """
    check_axes("weights", weights, 4)
    batch, _, rows, keys = weights.shape
    target, valid = _sets(target_mask, valid, (batch, keys))
    received = weights.float()
    if row_valid is not None:
        _check_shape("row_valid", row_valid, (batch, rows), "(batch, rows)")
        received = received.masked_fill(~row_valid.bool()[:, None, :, None], 0.0)
    received = received.sum(dim=2)  # (batch, heads, keys)
    inside, total = (received.masked_fill(~keep[:, None], 0.0).sum(dim=-1) for keep in (target, valid))
    return inside / total


def target_share(target_mask: Tensor, valid: Tensor | None = None) -> Tensor:
    """Compute the share of the valid keys that belongs to a set: the mass it gets from uniform attention.

    Args:
        target_mask: ``True`` for the keys of the set.
        valid: ``True`` for the keys that count; ``None`` means all.

    Shape:
        - target_mask, valid: ``(batch, keys)``
        - output: ``(batch,)``, float32, NaN for a sample without a valid key

    Raises:
        ValueError: If a shape does not fit.

    Example:
        >>> target_share(torch.tensor([[True, False, False, False]]))
        tensor([0.2500])
    """
    check_axes("target_mask", target_mask, 2)
    target, valid = _sets(target_mask, valid, tuple(target_mask.shape))
    return target.sum(dim=1) / valid.sum(dim=1)


def attention_lift(
    weights: Tensor, target_mask: Tensor, valid: Tensor | None = None, *, row_valid: Tensor | None = None
) -> Tensor:
    """Compare the attention mass on a set of keys with the set's share of the valid keys.

    One is what uniform attention gives when every row may attend to every valid key; under a causal mask early keys
    get more than that from uniform attention too.

    Args:
        weights: Attention weights; a row of zeros adds nothing.
        target_mask: ``True`` for the keys of the set.
        valid: ``True`` for the keys to normalise over; ``None`` means all.
        row_valid: ``True`` for the rows that count; ``None`` means all.

    Shape:
        - weights: ``(batch, heads, rows, keys)``
        - target_mask, valid: ``(batch, keys)``
        - row_valid: ``(batch, rows)``
        - output: ``(batch, heads)``, float32, NaN where the mass is undefined or the set is empty

    Raises:
        ValueError: If a shape does not fit.

    Example:
        >>> attention_lift(torch.full((1, 2, 3, 4), 0.25), torch.tensor([[True, False, False, False]]))
        tensor([[1., 1.]])
    """
    mass = attention_mass(weights, target_mask, valid, row_valid=row_valid)
    return mass / target_share(target_mask, valid)[:, None]


def _sets(target_mask: Tensor, valid: Tensor | None, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return the set cut to the valid keys, and the valid keys, both bool ``(batch, keys)``."""
    _check_shape("target_mask", target_mask, shape, "(batch, keys)")
    if valid is None:
        return target_mask.bool(), torch.ones_like(target_mask, dtype=torch.bool)
    _check_shape("valid", valid, shape, "(batch, keys)")
    return target_mask.bool() & valid.bool(), valid.bool()


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...], axes: str) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(f"`{name}` must have shape {axes} = {expected}, got {tuple(tensor.shape)}.")
