"""Attention of long sequences in few numbers, added up a few rows at a time where no kernel can do it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attn_callbacks.capture.rows import row_chunks

__all__ = ["pooled_weights", "received_from_rows"]


def pooled_weights(
    weights: Callable[[Tensor], Tensor], valid: Tensor, shape: tuple[int, int, int, int], parts: tuple[int, int]
) -> Tensor:
    """Average the rows of each part of the queries, and add up the keys of each part of the keys.

    Args:
        weights: Gives the weights ``(batch, heads, rows, keys)`` of some rows.
        valid: ``True`` where a query counts; so does only one that attends to something.
        shape: ``(batch, heads, queries, keys)`` of the whole.
        parts: Numbers of parts of the queries and of the keys.

    Shape:
        - valid: ``(batch, queries)``
        - output: ``(batch, heads, *parts)``
    """
    batch, heads, queries, keys = shape
    places = torch.arange(queries, device=valid.device) * parts[0] // queries
    columns = torch.arange(keys, device=valid.device) * parts[1] // keys
    total = torch.zeros(batch, heads, *parts, dtype=torch.float32, device=valid.device)
    count = torch.zeros(batch, heads, parts[0], dtype=torch.float32, device=valid.device)
    for rows in row_chunks(shape, valid.device):
        own = weights(rows).float() * valid[:, None, rows, None]
        pooled = own.new_zeros(batch, heads, len(rows), parts[1]).index_add(-1, columns, own)
        total = total.index_add(2, places[rows], pooled)
        count = count.index_add(2, places[rows], (own.sum(dim=-1) > 0).float())
    return total / count.clamp_min(1.0)[..., None]


def received_from_rows(weights: Callable[[Tensor], Tensor], valid: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """Add up the weights that each key gets from the valid queries, ``(batch, heads, keys)``; arguments as above."""
    chunks = row_chunks(shape, valid.device)
    found = [(weights(rows) * valid[:, None, rows, None]).sum(dim=2) for rows in chunks]
    return torch.stack(found).sum(dim=0)
