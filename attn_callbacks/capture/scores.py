"""Scores of attention as a kernel has them before its softmax, and what a mask lets through, for some rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attn_callbacks.capture.rows import take_rows

__all__ = ["fused_scores", "let_through", "softmax_rows", "wide"]

_MASKED = -1e8  # additive masks below are "may not attend": finfo.min, -inf and -1e9 are, no position bias ever is


def wide(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in float32, or in float64 if it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def fused_scores(query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None, rows: Tensor | None) -> Tensor:
    """Compute ``query @ key`` with its scale and additive mask; a boolean mask is left aside.

    Shape:
        - query: ``(batch, heads, queries, head_dim)``
        - key: ``(batch, key_heads, keys, head_dim)``
        - mask: four axes, broadcastable to the whole
        - output: ``(batch, heads, rows, keys)``
    """
    query, key = wide(take_rows(query, rows)), wide(key)
    if 1 < key.shape[1] < query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = (query @ key.transpose(-2, -1)) * (1.0 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if mask is not None and mask.is_floating_point():
        scores = scores + wide(take_rows(mask, rows))
    return scores


def softmax_rows(logits: Tensor) -> Tensor:
    """Turn logits ``(..., keys)`` into weights; a row without any allowed key, all ``-inf``, becomes zeros."""
    dead = logits.detach().amax(dim=-1, keepdim=True) == -math.inf
    # zeros, not -inf, in rows without keys: a softmax of -inf alone is NaN, and so is its gradient
    return torch.softmax(logits.masked_fill(dead, 0.0), dim=-1).masked_fill(dead, 0.0)


def let_through(mask: Tensor, rows: Tensor | None) -> Tensor:
    """Read a mask, boolean or additive: ``True`` where a query may attend."""
    taken = take_rows(mask, rows)
    return taken if taken.dtype == torch.bool else taken > max(_MASKED, torch.finfo(taken.dtype).min / 2)
