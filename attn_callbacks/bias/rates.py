"""Rates and how far they can be trusted. What was not measured is NaN, never zero and never fair."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rate", "rate_error", "shortfall", "spread"]


def rate(hits: Tensor, support: Tensor) -> Tensor:
    """Divide counts in float64; NaN where there is no support.

    Example:
        >>> rate(torch.tensor([1, 0]), torch.tensor([4, 0]))
        tensor([0.2500, nan], dtype=torch.float64)
    """
    return hits.double() / support.double()


def rate_error(rates: Tensor, support: Tensor) -> Tensor:
    r"""Estimate the standard error of rates, with one hit and one miss added to the sample.

    .. math:: \sqrt{\tilde p (1 - \tilde p) / (n + 2)}, \qquad \tilde p = (n p + 1) / (n + 2)

    Without them a rate of exactly 0 or 1 would look certain after a single sample.

    Example:
        >>> rate_error(torch.tensor([1.0, 0.5]), torch.tensor([2, 98]))
        tensor([0.2165, 0.0500], dtype=torch.float64)

    References:
        Agresti and Coull, "Approximate is Better than 'Exact' for Interval Estimation of Binomial Proportions", 1998.
    """
    size = support.double() + 2
    smoothed = (rates.double() * support + 1) / size
    return (smoothed * (1 - smoothed) / size).sqrt()


def shortfall(rates: Tensor, errors: Tensor, estimable: Tensor) -> tuple[Tensor, Tensor]:
    """Measure how far each rate lies below the mean of its estimable peers along the first axis.

    Args:
        rates: Rates.
        errors: Their standard errors.
        estimable: ``True`` where there is enough support to compare.

    Shape:
        - rates, errors, estimable: ``(peers, ...)``
        - output: size and standard error of each shortfall, in the shape of ``rates``; NaN where a rate is not
          estimable or has no estimable peer

    Example:
        >>> size, error = shortfall(torch.tensor([0.5, 0.9, 0.7]), torch.zeros(3), torch.ones(3, dtype=torch.bool))
        >>> size
        tensor([ 0.3000, -0.3000, 0.0000])
    """
    known, variance = rates.where(estimable, 0.0), errors.square().where(estimable, 0.0)
    peers = estimable.sum(dim=0, keepdim=True) - 1
    size = (known.sum(dim=0, keepdim=True) - known) / peers - known
    error = (variance + (variance.sum(dim=0, keepdim=True) - variance).clamp(min=0) / peers.square()).sqrt()
    return size.where(estimable, torch.nan), error.where(estimable, torch.nan)  # 0 / 0 without peers is NaN as well


def spread(rates: Tensor, estimable: Tensor) -> tuple[float, float]:
    """Return the lowest and the highest estimable rate, NaN where there is none.

    Example:
        >>> spread(torch.tensor([0.5, 0.75, 0.0]), torch.tensor([True, True, False]))
        (0.5, 0.75)
    """
    known = rates[estimable]
    if known.numel() == 0:
        return torch.nan, torch.nan
    return float(known.min()), float(known.max())
