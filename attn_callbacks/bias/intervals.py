"""Confidence intervals of rates, of means, and of the difference between two looks at the same samples."""

from __future__ import annotations

from statistics import NormalDist

import torch
from torch import Tensor

__all__ = ["LEVEL", "deviations", "normal_interval", "paired_interval", "wilson_bounds", "wilson_interval"]

LEVEL = 0.95
"""Confidence of every interval in a report."""


def deviations(level: float = LEVEL) -> float:
    """Return how many standard errors an interval reaches to each side.

    Example:
        >>> round(deviations(0.95), 2)
        1.96
    """
    return NormalDist().inv_cdf((1 + level) / 2)


def wilson_bounds(rates: Tensor, support: Tensor, reach: Tensor | float) -> tuple[Tensor, Tensor]:
    r"""Return the lower and the upper bound of rates, so many standard errors away.

    .. math:: \frac{p + z^2/2n \pm z \sqrt{p(1 - p)/n + z^2/4n^2}}{1 + z^2/n}

    Args:
        rates: Rates; NaN stays NaN.
        support: Number of samples of each.
        reach: Number of standard errors :math:`z`, not negative.

    Shape:
        - rates, support, reach: broadcastable
        - output: two of their common shape

    References:
        Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", 1927.
    """
    size, values = support.double(), rates.double()
    square = torch.as_tensor(reach, dtype=torch.float64).square() / size
    centre = values + square / 2
    half = (square * (values * (1 - values) + square / 4)).clamp(min=0).sqrt()
    lower, upper = (centre - half) / (1 + square), (centre + half) / (1 + square)
    return lower.clamp(min=0), upper.clamp(max=1)


def wilson_interval(hits: Tensor, support: Tensor, level: float = LEVEL) -> Tensor:
    """Return the score interval of rates: of sound width for few samples, and for rates of exactly 0 or 1.

    Args:
        hits: Number of hits.
        support: Number of samples; without any, the interval is NaN.
        level: Confidence.

    Shape:
        - hits, support: ``(...)``
        - output: ``(..., 2)``

    Example:
        >>> wilson_interval(torch.tensor([10, 5]), torch.tensor([10, 10]))
        tensor([[0.7225, 1.0000],
                [0.2366, 0.7634]], dtype=torch.float64)
    """
    rates = hits.double() / support.double()
    return torch.stack(wilson_bounds(rates, support, deviations(level)), dim=-1)


def normal_interval(size: Tensor, error: Tensor, level: float = LEVEL) -> Tensor:
    """Return the interval of a mean with a known standard error.

    Shape:
        - size, error: ``(...)``
        - output: ``(..., 2)``

    Example:
        >>> normal_interval(torch.tensor([0.5]), torch.tensor([0.1]))
        tensor([[0.3040, 0.6960]], dtype=torch.float64)
    """
    half = deviations(level) * error.double()
    return torch.stack([size.double() - half, size.double() + half], dim=-1)


def paired_interval(counts: Tensor, level: float = LEVEL) -> Tensor:
    """Return the interval of how much a rate falls between two looks at the same samples.

    Squares and adds the distances of the Wilson bounds of both rates, less what their correlation accounts for.

    Args:
        counts: Number of samples by what they were before and after: missed 0, hit 1.
        level: Confidence.

    Shape:
        - counts: ``(..., 2, 2)``
        - output: ``(..., 2)``; NaN without samples

    Example:
        >>> paired_interval(torch.tensor([[0, 2], [12, 36]]))
        tensor([0.0569, 0.3404], dtype=torch.float64)

    References:
        Newcombe, "Improved Confidence Intervals for the Difference between Binomial Proportions Based on Paired Data",
        1998, method 10.
    """
    table = counts.double()
    neither, gained, lost, both = (table[..., i, j] for i in (0, 1) for j in (0, 1))
    total = table.sum(dim=(-2, -1))
    before, after = (both + lost) / total, (both + gained) / total
    agreement = both * neither - lost * gained
    agreement = agreement.where(agreement <= 0, (agreement - total / 2).clamp(min=0))
    scale = ((both + lost) * (neither + gained) * (both + gained) * (neither + lost)).sqrt()
    correlation = (agreement / scale).where(scale > 0, 0.0)
    reach = deviations(level)
    low_before, high_before = wilson_bounds(before, total, reach)
    low_after, high_after = wilson_bounds(after, total, reach)
    drop = before - after
    down = _joint(before - low_before, high_after - after, correlation)
    up = _joint(high_before - before, after - low_after, correlation)
    return torch.stack([drop - down, drop + up], dim=-1)


def _joint(first: Tensor, second: Tensor, correlation: Tensor) -> Tensor:
    """Return how far a difference reaches whose two parts reach so far each; the square root of a sum of squares."""
    square = first.square() - 2 * correlation * first * second + second.square()
    return square.clamp(min=0).sqrt()
