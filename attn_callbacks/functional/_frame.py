"""What surrounds attention rows: which pairs and rows count, and where rows and keys lie."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Frame", "frame_of"]


@dataclass(frozen=True, eq=False)
class Frame:
    """Everything about rows of attention that is no weight.

    Args:
        allowed: Which pairs may attend; four axes, broadcastable to the weights.
        choices: Number of keys that each row may attend to: ``allowed`` summed over keys.
        valid: Which rows count, ``(batch, heads, rows)``.
        first: The first key of each sample that is no padding, ``(batch,)``.
        queries: Query index of each row, ``(batch or 1, rows)``; ``None`` for cross-attention.
        limit: Distance beyond which a key is far away, ``(batch or 1,)``.
    """

    allowed: Tensor
    choices: Tensor
    valid: Tensor
    first: Tensor
    queries: Tensor | None
    limit: Tensor


def frame_of(
    attention: Tensor,
    attends: Tensor,
    *,
    positions: Tensor | None,
    allowed: Tensor | None,
    valid: Tensor | None,
    key_valid: Tensor | None,
    long_range: float,
    square: bool,
) -> Frame:
    """Check the arguments of `head_statistics` and fill in what is missing.

    Args:
        attention: Weights or logits, ``(batch, heads, rows, keys)``; only their shape and device matter.
        attends: Rows that attend to anything, ``(batch, heads, rows)``.
        positions: These and all others are those of `head_statistics`.
    """
    if not long_range > 0:
        raise ValueError(f"`long_range` must be above 0, got {long_range}.")
    pairs = _allowed_pairs(attention, allowed, key_valid)
    choices = pairs.sum(dim=-1, dtype=torch.int32)  # a third of the time of int64
    # the keys that any row of a sample may attend to, if nothing better is known
    tokens = pairs.any(dim=2).any(dim=1).expand(len(attention), -1) if key_valid is None else key_valid.bool()
    return Frame(
        allowed=pairs,
        choices=choices,
        valid=attends & (choices > 0) & _wanted_rows(attention, valid),
        first=tokens.to(torch.uint8).argmax(dim=-1),
        queries=_query_positions(attention, positions) if square else None,
        limit=long_range * tokens.sum(dim=-1).float() if long_range < 1 else attention.new_tensor([long_range]),
    )


def _allowed_pairs(attention: Tensor, allowed: Tensor | None, key_valid: Tensor | None) -> Tensor:
    batch, _, _, keys = attention.shape
    pairs = torch.ones(1, 1, 1, keys, dtype=torch.bool, device=attention.device)
    if allowed is not None:
        try:
            allowed.expand(attention.shape)
        except RuntimeError:
            raise ValueError(
                f"`allowed` must be broadcastable to `weights` {tuple(attention.shape)}, got {tuple(allowed.shape)}."
            ) from None
        pairs = pairs & allowed.bool()
    if key_valid is not None:
        if key_valid.shape != (batch, keys):
            raise ValueError(
                f"`key_valid` must have shape (batch, keys) = {(batch, keys)}, got {tuple(key_valid.shape)}."
            )
        pairs = pairs & key_valid.bool()[:, None, None]
    return pairs


def _wanted_rows(attention: Tensor, valid: Tensor | None) -> Tensor:
    """Return the rows that are asked for, broadcastable to ``(batch, heads, rows)``."""
    batch, heads, rows, _ = attention.shape
    if valid is None:
        return torch.ones(1, 1, 1, dtype=torch.bool, device=attention.device)
    if valid.shape not in ((batch, rows), (batch, heads, rows)):
        raise ValueError(
            f"`valid` must have shape (batch, rows) = {(batch, rows)} or (batch, heads, rows) = "
            f"{(batch, heads, rows)}, got {tuple(valid.shape)}."
        )
    return (valid if valid.dim() == 3 else valid[:, None]).bool()


def _query_positions(attention: Tensor, positions: Tensor | None) -> Tensor:
    """Return the query index of each row, ``(batch or 1, rows)``."""
    batch, _, rows, keys = attention.shape
    if positions is None:
        if rows != keys:
            raise ValueError(
                f"`positions` must say which query each row is when {rows} rows meet {keys} keys. "
                "For cross-attention pass `square=False`."
            )
        return torch.arange(rows, device=attention.device)[None]
    if positions.shape not in ((rows,), (batch, rows)):
        raise ValueError(
            f"`positions` must have shape (rows,) = {(rows,)} or (batch, rows) = {(batch, rows)}, "
            f"got {tuple(positions.shape)}."
        )
    return positions if positions.dim() == 2 else positions[None]
