"""The interval of any function of counts, by drawing the counts again. Equal on every process."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from attn_callbacks.bias.intervals import LEVEL

__all__ = ["bootstrap_interval"]

_SEED = 20_011
_MOST_DRAWS, _LEAST_DRAWS = 1000, 200
_CHUNK = 4_000_000
"""Cells redrawn at a time."""

_ALL_CELLS, _MOST_CELLS = 100_000_000, 1_000_000
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
    tables of more than 100,000 cells (a second or two for a million); larger ones are not drawn.

    Args:
        counts: Number of samples in each cell.
        statistic: Turns ``(draws, *counts.shape)`` in float64 into ``(draws,)``; NaN where it is undefined.
        bounds: Least and greatest possible value.
        smoothing: Added to each count before drawing; without it, a rate of 0 or 1 stays there in every draw.
        level: Confidence.

    Returns:
        Lower and upper bound; NaN without samples, for more than a million cells, or where the statistic is undefined.

    Example:
        >>> hits_and_misses = torch.tensor([[45, 5], [30, 20]])
        >>> low, high = bootstrap_interval(
        ...     hits_and_misses, lambda table: (table[..., 0] / table.sum(dim=-1)).amin(dim=-1)
        ... )
        >>> 0.45 < low < 0.5 and 0.7 < high < 0.75
        True
    """
    total = int(counts.sum())
    value = float(statistic(counts.double().unsqueeze(0))[0])
    if total == 0 or counts.numel() > _MOST_CELLS or math.isnan(value):
        return math.nan, math.nan
    redrawn = torch.cat([statistic(table) for table in _redraw(counts, total, smoothing)])
    redrawn = redrawn[~redrawn.isnan()]
    if len(redrawn) == 0:
        return math.nan, math.nan
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = (float(bound) for bound in redrawn.quantile(tails))
    return max(min(low, 2 * value - high), bounds[0]), min(max(high, 2 * value - low), bounds[1])


def _redraw(counts: Tensor, total: int, smoothing: float) -> Iterator[Tensor]:
    """Yield tables drawn again, ``(draws, *counts.shape)`` at a time."""
    weights = counts.double().flatten().numpy() + smoothing
    (cells,) = weights.nonzero()  # most of a confusion matrix of many classes is empty
    shares = weights[cells] / weights.sum()
    draws = min(max(_ALL_CELLS // weights.size, _LEAST_DRAWS), _MOST_DRAWS)
    generator, chunk = np.random.default_rng(_SEED), max(_CHUNK // weights.size, 1)
    for done in range(0, draws, chunk):
        size = min(chunk, draws - done)
        table = np.zeros((size, weights.size))
        table[:, cells] = generator.multinomial(total, shares, size=size)
        yield torch.from_numpy(table).reshape(size, *counts.shape)
