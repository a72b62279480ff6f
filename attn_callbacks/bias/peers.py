"""How far a rate lies below the mean of its peers: interval and significance."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_callbacks.bias.corrections import normal_p
from attn_callbacks.bias.intervals import deviations, wilson_bounds

__all__ = ["shortfall_interval", "shortfall_p"]

_FARTHEST, _MARKS, _HALVINGS = 37.0, 1025, 40
"""Standard errors beyond which float64 has no probability left; the marks on the way there; steps of the search."""

_CHUNK = 4_000_000


def shortfall_interval(rates: Tensor, support: Tensor, estimable: Tensor) -> Tensor:
    """Return the 95 % interval of each shortfall: the distances of all Wilson bounds, squared and added.

    Args:
        rates: Rates.
        support: Number of samples of each.
        estimable: ``True`` where there is enough support to compare.

    Shape:
        - rates, support, estimable: ``(peers, ...)``
        - output: ``(peers, ..., 2)``; NaN where a rate is not estimable or has no estimable peer

    Example:
        >>> rates, support = torch.tensor([48 / 80, 56 / 70]), torch.tensor([80, 70])
        >>> shortfall_interval(rates, support, torch.ones(2, dtype=torch.bool))[0]
        tensor([0.0524, 0.3339], dtype=torch.float64)

    References:
        Newcombe, "Interval Estimation for the Difference between Independent Proportions", 1998, method 10; Zou and
        Donner, "Construction of Confidence Limits about Effect Measures", 2008, for more than two.
    """
    known, peers = estimable.double(), _peers(estimable)
    values, lower, upper = _bounds(rates, support, estimable, deviations())
    below, above = ((values - lower) * known).square(), ((upper - values) * known).square()
    size = _shortfall(values, known, peers)
    down = above + (below.sum(dim=0) - below).clamp(min=0) / peers.square()
    up = below + (above.sum(dim=0) - above).clamp(min=0) / peers.square()
    interval = torch.stack([size - down.sqrt(), size + up.sqrt()], dim=-1)
    return interval.where((estimable & (peers > 0)).unsqueeze(-1), torch.nan)


def shortfall_p(rates: Tensor, support: Tensor, estimable: Tensor) -> Tensor:
    """Return how probable each shortfall is by chance: the one-sided level at which its interval reaches down to 0.

    So significance and interval agree, also for few samples and for rates of exactly 0 or 1, where the standard error
    alone misleads.

    Shape:
        - rates, support, estimable: ``(peers, ...)``
        - output: ``(peers, ...)``; 1 for a rate above its peers; NaN where a rate is not estimable or has no estimable
          peer

    Example:
        >>> rates, support = torch.tensor([0.0, 0.2]), torch.tensor([20, 1_000_000])
        >>> shortfall_p(rates, support, torch.ones(2, dtype=torch.bool))  # 2.24 standard errors by the score test
        tensor([0.0127, 1.0000], dtype=torch.float64)
    """
    known, peers = estimable.double(), _peers(estimable)
    size = _shortfall(rates.double().where(estimable, 0.0), known, peers)
    marks = _peer_marks(rates, support, estimable)
    near, far = torch.zeros_like(size), torch.full_like(size, _FARTHEST)
    for _ in range(_HALVINGS):  # the farther, the lower the bound
        middle = (near + far) / 2
        values, lower, upper = _bounds(rates, support, estimable, middle)
        others = (_between(marks, middle) - ((values - lower) * known).square()).clamp(min=0)
        reaches = (upper - values).square() + others / peers.square() >= size.square()
        near, far = near.where(reaches, middle), middle.where(reaches, far)
    chance = normal_p(far, two_sided=False).where(size > 0, 1.0)
    return chance.where(estimable & (peers > 0), torch.nan)


def _peers(estimable: Tensor) -> Tensor:
    return (estimable.sum(dim=0, keepdim=True) - 1).double()


def _shortfall(values: Tensor, known: Tensor, peers: Tensor) -> Tensor:
    return ((values * known).sum(dim=0, keepdim=True) - values) / peers - values


def _bounds(rates: Tensor, support: Tensor, estimable: Tensor, reach: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    """Rates and their Wilson bounds; where there is no support, numbers that the caller leaves out."""
    values, size = rates.double().where(estimable, 0.0), support.double().where(estimable, 1.0)
    return (values, *wilson_bounds(values, size, reach))


def _peer_marks(rates: Tensor, support: Tensor, estimable: Tensor) -> Tensor:
    """Sum, over all rates, the squared distances of the lower bounds at marks along the way: ``(marks, ...)``.

    Each search needs the sum at another point. Between marks it is all but straight.
    """
    chunks = torch.linspace(0, _FARTHEST, _MARKS, dtype=torch.float64).split(max(_CHUNK // max(rates.numel(), 1), 1))
    sums = []
    for chunk in chunks:
        reach = chunk.reshape(-1, *[1] * rates.ndim)
        values, lower, _ = _bounds(rates, support, estimable, reach)
        sums.append(((values - lower) * estimable.double()).square().sum(dim=1))
    return torch.cat(sums)


def _between(marks: Tensor, reach: Tensor) -> Tensor:
    """Read marks at places between them."""
    place = reach * ((_MARKS - 1) / _FARTHEST)
    left = place.long().clamp(max=_MARKS - 2)
    low, high = marks.gather(0, left), marks.gather(0, left + 1)
    return low + (high - low) * (place - left)
