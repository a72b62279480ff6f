"""Query rows: draw a few of them without bias, and average over the valid ones."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_callbacks._checks import at_least, check_axes

__all__ = ["row_mean", "stratified_rows"]


def row_mean(values: Tensor, rows: Tensor) -> Tensor:
    """Average ``values`` over the rows that count.

    Args:
        values: One value a row.
        rows: ``True`` for the rows that count. What the others hold is ignored, NaN included.

    Shape:
        - values: ``(..., rows)``
        - rows: bool, broadcastable to ``values``
        - output: ``(...)``, NaN where no row counts

    Example:
        >>> row_mean(torch.tensor([[1.0, 3.0, 9.0], [1.0, 2.0, 3.0]]), torch.tensor([[True, True, False], [False] * 3]))
        tensor([2., nan])
    """
    rows = rows.expand_as(values)
    return values.where(rows, 0.0).sum(dim=-1) / rows.sum(dim=-1)


def stratified_rows(valid: Tensor, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw query rows from equal strata of each sample's valid queries, one random row a stratum.

    The plain mean over the drawn rows is an unbiased estimate of the mean over all valid rows, and steadier than that
    of rows drawn at random, because attention statistics drift along the sequence. The strata are equal intervals of
    the row axis, so where one ends inside a row both neighbours may draw that row: this keeps the estimate unbiased.
    A sample with at most ``rows`` valid queries gives each of them once.

    Vectorised, O(batch * (queries + rows)); waits for no device and leaves the global random state alone.

    Args:
        valid: ``True`` for the queries to draw from; padding is ``False``.
        rows: Rows to draw from each sample, at least 1.
        generator: Private source of random numbers, on any device.

    Shape:
        - valid: ``(batch, queries)``
        - output: indices ``(batch, rows)`` int64 in ascending order, and ``(batch, rows)`` bool, ``False`` for the
          slots that a short sample leaves over (their index is 0)

    Raises:
        ValueError: If ``valid`` does not have two axes or ``rows`` is below 1.

    Example:
        >>> indices, drawn = stratified_rows(torch.tensor([[False, True, True]]), 4, torch.Generator())
        >>> indices, drawn
        (tensor([[1, 2, 0, 0]]), tensor([[ True,  True, False, False]]))

    References:
        Cochran, "Sampling Techniques", 1977, chapter 5.
    """
    check_axes("valid", valid, 2)
    at_least("rows", rows, 1)
    found = valid.cumsum(dim=1)  # (batch, queries): valid queries up to and including this one
    count = found[:, -1:]
    slots = torch.arange(rows, device=valid.device)
    # Stratum k covers [k, k + 1) * count / rows. The whole part of its start is exact in integers, so that float32
    # holds only what is left, at any length.
    start = slots * count
    offset = torch.rand(len(valid), rows, generator=generator, device=generator.device).to(valid.device)
    inside = (start % rows + offset * count) / rows
    drawn = torch.minimum(start // rows + inside.long(), count - 1)
    taken = slots < count
    rank = torch.where(count > rows, drawn, slots)
    indices = torch.searchsorted(found, rank + 1)
    return indices.where(taken, 0), taken
