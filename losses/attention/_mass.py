"""The share of attention that falls on a set of keys, and what missing it costs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from losses._checks import ROUNDING, accumulation_dtype, check_shape, check_within
from losses.attention._rows import FLOOR

__all__ = ["Degrees", "degrees", "key_sums", "mass", "surprise"]


class Degrees(NamedTuple):
    """To which degree each key is real, and a member of a set; both in the dtype of sums over weights."""

    real: Tensor  # (batch, keys)
    member: Tensor  # (batch, keys), zero where the key is not real


def degrees(name: str, mask: Tensor, valid: Tensor | None, layer: Tensor) -> Degrees:
    """Return the degrees of membership in the set ``mask``, called ``name``, after checking it.

    Args:
        name: What an error calls the set.
        mask: Degree to which each key is a member, boolean or in ``[0, 1]``.
        valid: ``True`` for real tokens; ``None``: all.
        layer: Weights whose keys these are.

    Shape:
        - mask, valid: ``(batch, keys)``
        - layer: ``(batch, heads, queries, keys)``

    Raises:
        ValueError: If the shape of ``mask`` does not fit or (checked on the CPU only) it has values outside ``[0, 1]``.
    """
    batch_keys, dtype = (layer.shape[0], layer.shape[3]), accumulation_dtype(layer)
    check_shape(name, mask, batch_keys, "(batch, keys)")
    check_within(name, mask.detach(), 0, 1, slack=ROUNDING)
    real = layer.new_ones(batch_keys, dtype=dtype) if valid is None else valid.to(dtype)
    return Degrees(real, mask.to(dtype) * real)


def key_sums(rows: Tensor, *columns: Tensor) -> tuple[Tensor, ...]:
    """Return the sum over keys of each row, weighted by each of the columns, in one pass over the rows.

    Args:
        rows: What to add up.
        columns: Weight of each key; one tensor per sum.

    Shape:
        - rows: ``(batch, heads, rows, keys)``
        - columns: ``(batch, keys)`` each
        - output: ``(batch, heads, rows)`` each
    """
    table = torch.stack(columns, dim=1).mT  # (batch, keys, sums); one sum after the other in memory, which is faster
    sums = rows.to(table.dtype).flatten(1, 2) @ table
    return tuple(sums.reshape(*rows.shape[:3], len(columns)).unbind(dim=-1))


def mass(rows: Tensor, real: Tensor, *wanted: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return the shares of each row that fall on sets of keys, and the sum of the row over real keys.

    Args:
        rows: Attention weights.
        real: One for keys that count, zero for padding.
        wanted: Degree to which each key belongs to a set, zero for padding; one tensor per set.

    Shape:
        - rows: ``(batch, heads, rows, keys)``
        - real, wanted: ``(batch, keys)``
        - output: ``(batch, heads, rows)`` each; shares are finite in empty rows, too
    """
    total, *parts = key_sums(rows, real, *wanted)
    return [part / total.clamp(min=FLOOR) for part in parts], total


def surprise(share: Tensor) -> Tensor:
    """Return ``-log(share)``, finite at zero with a gradient there, and exactly zero at one."""
    return -torch.log(FLOOR + (1 - FLOOR) * share)
