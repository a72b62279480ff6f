"""Rows of attention: the queries that somebody wants, the same ones for all samples or other ones for each."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

__all__ = ["check_rows", "row_chunks", "take_rows"]

_CHUNK = 256


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


def row_chunks(queries: int, device: torch.device) -> Sequence[Tensor]:
    """Split all rows into lists short enough to work on one after the other."""
    return torch.arange(queries, device=device).tensor_split(tuple(range(_CHUNK, queries, _CHUNK)))


def take_rows(tensor: Tensor, rows: Tensor | None) -> Tensor:
    """Take rows of a ``(batch | 1, heads | 1, queries | 1, n)`` tensor; a broadcast query axis stays as it is."""
    if rows is None or tensor.shape[-2] == 1:
        return tensor
    if rows.ndim == 1:
        return tensor.index_select(-2, rows)
    wide = tensor.expand(len(rows), -1, -1, -1)
    index = rows[:, None, :, None].expand(-1, wide.shape[1], -1, wide.shape[-1])
    return wide.gather(-2, index)
