"""Rows of attention: the queries that somebody wants, the same ones for all samples or other ones for each."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

__all__ = ["check_rows", "row_chunks", "rows_at_once", "take_rows"]

_CHUNK = 256
_BLOCK_BYTES = 16 * 2**20


def check_rows(
    rows: Tensor | Sequence[int] | None, shape: tuple[int, int, int, int], device: torch.device
) -> Tensor | None:
    """Return ``rows`` on ``device`` if they are ``(rows,)`` or ``(batch, rows)`` indices for attention of ``shape``."""
    if rows is None:
        return None
    rows = _indices(rows)
    if rows.ndim not in (1, 2) or (rows.ndim == 2 and len(rows) != shape[0]):
        raise ValueError(
            f"`rows` must have shape (rows,) or (batch, rows) = ({shape[0]}, rows), got {tuple(rows.shape)}."
        )
    if rows.device.type == "cpu":  # elsewhere a look at the values would wait for the device
        _check_range(rows, shape[2])
    return rows.to(device)


def _indices(rows: Tensor | Sequence[int]) -> Tensor:
    if isinstance(rows, (list, tuple)) and all(isinstance(row, Integral) and not isinstance(row, bool) for row in rows):
        return torch.tensor(rows, dtype=torch.long)
    if not isinstance(rows, Tensor):
        raise TypeError(f"`rows` must be a tensor or a list of integers, got {rows!r}.")
    if rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool:
        raise TypeError(f"`rows` must hold integers, the indices of queries, got {rows.dtype}.")
    return rows.long()


def _check_range(rows: Tensor, queries: int) -> None:
    outside = rows[(rows < 0) | (rows >= queries)]
    if len(outside) > 0:
        raise ValueError(f"`rows` must lie between 0 and {queries - 1}, got {int(outside[0])}.")


def rows_at_once(maps: int, keys: int, rows: int) -> int:
    """Return how many of the rows of so many maps (samples x heads) are worked on at a time: a few megabytes."""
    return max(16, min(rows, _BLOCK_BYTES // (4 * max(maps * keys, 1))))


def row_chunks(shape: tuple[int, int, int, int], device: torch.device) -> Sequence[Tensor]:
    """Split all rows of attention ``(batch, heads, queries, keys)`` into lists to work on one after the other."""
    batch, heads, queries, keys = shape
    chunks: Sequence[Tensor] = torch.arange(queries, device=device).split(rows_at_once(batch * heads, keys, _CHUNK))
    return chunks


def take_rows(tensor: Tensor, rows: Tensor | None) -> Tensor:
    """Take rows of a ``(batch | 1, heads | 1, queries | 1, n)`` tensor; a broadcast query axis stays as it is."""
    if rows is None or tensor.shape[-2] == 1:
        return tensor
    if rows.ndim == 1:
        return tensor.index_select(-2, rows)
    wide = tensor.expand(len(rows), -1, -1, -1)
    batch, head = (torch.arange(size, device=tensor.device) for size in wide.shape[:2])
    return wide[batch[:, None, None], head[:, None], rows[:, None]]  # copies whole rows, which `gather` does not
