"""The interval of any function of counts, by drawing the counts again. Equal on every process."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from attn_callbacks.bias.intervals import LEVEL

__all__ = ["Margins", "bootstrap_interval", "margins_interval", "margins_of"]

_SEED = 20_011
_MOST_DRAWS, _LEAST_DRAWS = 1000, 200
_CHUNK = 4_000_000
"""Cells redrawn at a time."""

_ALL_CELLS, _MOST_CELLS = 2_000_000, 200_000
"""Cells redrawn in all, unless the fewest draws already need more; cells of a table beyond which none is drawn."""


def bootstrap_interval(
    counts: Tensor,
    statistic: Callable[[Tensor], Tensor],
    *,
    bounds: tuple[float, float] = (0.0, 1.0),
    smoothing: float = 0.0,
    level: float = LEVEL,
) -> tuple[float, float]:
    """Return the interval of a function of counts by drawing the counts again, as many samples as there were.

    A worst case is low by selection, and a gap or a calibration error large by it; redrawn counts are selected twice.
    The interval therefore spans the quantiles of the redrawn values *and* their mirror image about the value itself
    (the percentile and the basic interval). Where several groups are equally bad it may still cover less than it says.

    Random numbers are its own, from a fixed seed: equal counts give equal intervals. Takes 1000 draws, down to 200 for
    tables of 10,000 cells (a few tenths of a second for those); larger ones are not drawn.

    Args:
        counts: Number of samples in each cell.
        statistic: Turns ``(draws, *counts.shape)`` in float64 into ``(draws,)``; NaN where it is undefined.
        bounds: Least and greatest possible value.
        smoothing: Added to each count before drawing; without it, a rate of 0 or 1 stays there in every draw.
        level: Confidence.

    Returns:
        Lower and upper bound; NaN without samples, for more than 200,000 cells, or where the statistic is undefined.

    Example:
        >>> hits_and_misses = torch.tensor([[45, 5], [30, 20]])
        >>> low, high = bootstrap_interval(
        ...     hits_and_misses, lambda table: (table[..., 0] / table.sum(dim=-1)).amin(dim=-1)
        ... )
        >>> 0.45 < low < 0.5 and 0.7 < high < 0.75
        True
    """
    total = int(counts.sum())
    if total == 0 or counts.numel() > _MOST_CELLS:
        return math.nan, math.nan
    value = float(statistic(counts.double().unsqueeze(0))[0])
    if math.isnan(value):
        return math.nan, math.nan
    redrawn = torch.cat([statistic(table) for table in _redraw(counts, total, smoothing)])
    redrawn = redrawn[~redrawn.isnan()]
    if len(redrawn) == 0:
        return math.nan, math.nan
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = (float(bound) for bound in redrawn.quantile(tails))
    return max(min(low, 2 * value - high), bounds[0]), min(max(high, 2 * value - low), bounds[1])


class Margins(NamedTuple):
    """What rates are made of, ``(..., groups, classes)``.

    Args:
        hits: Right predictions of each class.
        support: Samples of each class.
        predicted: Predictions of each class.
    """

    hits: Tensor
    support: Tensor
    predicted: Tensor


def margins_of(counts: Tensor) -> Margins:
    """Return the margins of confusion counts, ``(..., groups, classes, classes)``."""
    return Margins(counts.diagonal(dim1=-2, dim2=-1), counts.sum(dim=-1), counts.sum(dim=-2))


def margins_interval(counts: Tensor, statistic: Callable[[Margins], Tensor]) -> tuple[float, float]:
    """Return the bootstrap interval of a function of the margins of confusion counts.

    Draws only the cells that hold samples: most of those of many classes are empty.

    Args:
        counts: Confusion counts: group, target, predicted.
        statistic: Turns margins of ``(draws, groups, classes)`` into ``(draws,)``.

    Shape:
        - counts: ``(groups, classes, classes)``
    """
    group, target, predicted = counts.nonzero(as_tuple=True)
    groups, classes = counts.shape[:2]
    label, guess, right = group * classes + target, group * classes + predicted, target == predicted

    def of_cells(cells: Tensor) -> Tensor:
        empty = cells.new_zeros(len(cells), groups * classes)
        sums = (
            empty.index_add(1, label[right], cells[:, right]),
            empty.index_add(1, label, cells),
            empty.index_add(1, guess, cells),
        )
        return statistic(Margins(*(margin.unflatten(1, (groups, classes)) for margin in sums)))

    return bootstrap_interval(counts[group, target, predicted], of_cells)


def _redraw(counts: Tensor, total: int, smoothing: float) -> Iterator[Tensor]:
    """Yield tables drawn again, ``(draws, *counts.shape)`` at a time."""
    weights = counts.double().flatten().numpy() + smoothing
    shares = weights / weights.sum()
    draws = min(max(_ALL_CELLS // weights.size, _LEAST_DRAWS), _MOST_DRAWS)
    generator, chunk = np.random.default_rng(_SEED), max(_CHUNK // weights.size, 1)
    for done in range(0, draws, chunk):
        size = min(chunk, draws - done)
        yield torch.from_numpy(generator.multinomial(total, shares, size=size)).double().reshape(size, *counts.shape)
