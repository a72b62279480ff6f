"""Evaluate FlexAttention's score and mask functions for some rows of attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["allowed", "at_sample", "modified_scores"]


def modified_scores(score_mod: Callable[..., Tensor], scores: Tensor, rows: Tensor | None) -> Tensor:
    """Apply ``score_mod(score, batch, head, query, key)`` to every entry of ``(batch, heads, rows, keys)``."""
    return _over_positions(score_mod, scores.shape, rows, scores.device, scores)


def allowed(mask_mod: Callable[..., Tensor], shape: Sequence[int], rows: Tensor | None, device: torch.device) -> Tensor:
    """Evaluate ``mask_mod(batch, head, query, key)``: bool ``(batch, heads, rows, keys)``."""
    batch, heads, queries, keys = shape
    wanted = queries if rows is None else rows.shape[-1]
    return _over_positions(mask_mod, (batch, heads, wanted, keys), rows, device)


def at_sample(function: Callable[..., Tensor] | None, sample: int, before: int) -> Callable[..., Tensor] | None:
    """Fix the batch index of a function of positions at ``sample``; ``before`` arguments come ahead of that index."""
    if function is None:
        return None
    inner = function

    def fixed(*arguments: Tensor) -> Tensor:
        batch = torch.full_like(arguments[before], sample)
        return inner(*arguments[:before], batch, *arguments[before + 1 :])

    return fixed


def _over_positions(
    function: Callable[..., Tensor], shape: Sequence[int], rows: Tensor | None, device: torch.device, *scores: Tensor
) -> Tensor:
    # the functions index tensors by position, which vmap alone refuses; PyTorch's own `create_mask` enters this too
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    batch, heads, wanted, keys = (torch.arange(size, device=device) for size in shape)
    row = wanted if rows is None else rows.to(device)

    def at(*position: Tensor) -> Tensor:
        *score, b, h, q, k = position
        return function(*score, b, h, row[b, q] if row.ndim == 2 else row[q], k)

    first = tuple(0 for _ in scores)
    for axis in reversed(range(4)):
        at = torch.vmap(at, in_dims=(*first, *(0 if axis == other else None for other in range(4))))
    with TransformGetItemToIndex():
        return at(*scores, batch, heads, wanted, keys)
