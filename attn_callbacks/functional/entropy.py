"""Entropy of attention rows, in nats."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_callbacks._checks import check_axes
from attn_callbacks.functional.rows import row_mean

__all__ = ["head_entropy", "row_entropy"]


def row_entropy(attention: Tensor) -> Tensor:
    """Compute the entropy ``-sum_j A[i, j] ln A[i, j]`` of every attention row, in nats.

    Differentiable, with a finite gradient where a weight is exactly zero (masked keys make such weights).

    Args:
        attention: Weights whose rows sum to one.

    Shape:
        - attention: ``(..., queries, keys)``
        - output: ``(..., queries)``, float32

    Example:
        >>> row_entropy(torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
        tensor([0.0000, 0.6931])
    """
    weights = attention.float()
    # In place: one copy of the map instead of three, and a third of the time.
    return -weights.clamp_min(torch.finfo(weights.dtype).tiny).log_().mul_(weights).sum(dim=-1)


def head_entropy(attention: Tensor, mask: Tensor | None = None) -> Tensor:
    """Average the entropy of every head's attention rows, in nats.

    Tells heads that look everywhere (``log(keys)``) from heads that pick one position (zero). One pass over the maps.

    Args:
        attention: Weights whose rows sum to one; a row of zeros is invalid.
        mask: ``True`` where a query may attend; ``None`` allows every pair. Queries without any allowed key are left
            out of the average.

    Shape:
        - attention: ``(batch, heads, queries, keys)``
        - mask: broadcastable to ``(batch, heads, queries, keys)``
        - output: ``(batch, heads)``, float32, NaN for a head without any valid row

    Raises:
        ValueError: If ``attention`` does not have four axes.

    Example:
        >>> head_entropy(torch.full((1, 2, 3, 4), 0.25))
        tensor([[1.3863, 1.3863]])

    References:
        Clark et al., "What Does BERT Look At?", 2019, section 3.3.
    """
    check_axes("attention", attention, 4)
    valid = attention.sum(dim=-1) != 0  # (batch, heads, queries)
    if mask is not None:
        valid = valid & mask.any(dim=-1)
    return row_mean(row_entropy(attention), valid)
