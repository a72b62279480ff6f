"""Scores of attention as a kernel has them before its softmax, and what a mask lets through, for some rows."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_callbacks.capture.rows import take_rows

__all__ = ["cut_off", "fused_scores", "let_through", "softmax_rows", "wide"]

_MASKED = -1e8  # additive masks below are "may not attend": finfo.min, -inf and -1e9 are, no position bias ever is


def wide(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in float32, or in float64 if it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def fused_scores(query: Tensor, key: Tensor, scale: float | None, rows: Tensor | None) -> Tensor:
    """Compute ``query @ key`` with its scale; masks are left aside.

    Shape:
        - query: ``(batch, heads, queries, head_dim)``
        - key: ``(batch, key_heads, keys, head_dim)``
        - output: ``(batch, heads, rows, keys)``
    """
    # the scale on the queries, not on rows x keys scores
    query = wide(take_rows(query, rows)) * (1.0 / math.sqrt(query.shape[-1]) if scale is None else scale)
    # contiguous first: a matmul would transpose while it copies, which takes up to five times as long
    columns = wide(key).contiguous().transpose(-2, -1)
    if key.shape[1] == query.shape[1]:
        return query @ columns
    # heads that share keys become rows of one product; else the keys would be copied for each of them
    groups = query.unflatten(1, (min(key.shape[1], query.shape[1]), -1))  # (batch, key_heads, group, rows, head_dim)
    scores: Tensor = (groups.flatten(2, 3) @ columns).unflatten(2, groups.shape[2:4]).flatten(1, 2)
    return scores


def softmax_rows(logits: Tensor) -> Tensor:
    """Turn logits ``(..., keys)`` into weights; a row without any allowed key, all ``-inf``, becomes zeros."""
    alive = logits.detach().amax(dim=-1, keepdim=True) != -math.inf
    # finite: a softmax of -inf alone is NaN, and so is its gradient
    return torch.softmax(logits.clamp_min(torch.finfo(logits.dtype).min), dim=-1) * alive


def cut_off(scores: Tensor) -> Tensor:
    """Widen scores, or an additive mask, and put ``-inf`` where they mean "may not attend"."""
    return F.threshold(wide(scores), _lowest(scores.dtype), -math.inf)


def let_through(mask: Tensor, rows: Tensor | None) -> Tensor:
    """Read a mask, boolean or additive: ``True`` where a query may attend."""
    taken = take_rows(mask, rows)
    return taken if taken.dtype == torch.bool else taken > _lowest(taken.dtype)


def _lowest(dtype: torch.dtype) -> float:
    return max(_MASKED, torch.finfo(dtype).min / 2)
