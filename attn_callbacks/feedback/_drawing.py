"""Weighted draws of samples, for any number of them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["draw_evenly", "draw_independently"]


def draw_independently(weights: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Return the indices of ``draws`` samples, each drawn independently; ``torch.multinomial`` stops at 2^24 samples.

    Args:
        weights: Finite, not negative, not all 0; ``(samples,)``.
        draws: How many to draw.
        generator: Source of random numbers, on the CPU.

    Example:
        >>> draw_independently(torch.tensor([0.0, 1.0, 0.0]), 3, torch.Generator())
        tensor([1, 1, 1])
    """
    return _located(weights, torch.rand(draws, dtype=torch.float64, generator=generator))


def draw_evenly(weights: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Return the indices of ``draws`` samples, each as often as is to be expected, rounded up or down at random.

    Systematic sampling: one draw at even distances along the samples in random order, then mixed. Every sample comes
    ``draws * weight / sum of weights`` times on average, as with independent draws, with the least variance.

    Args:
        weights: Finite, not negative, not all 0; ``(samples,)``.
        draws: How many to draw.
        generator: Source of random numbers, on the CPU.

    Example:
        >>> draw_evenly(torch.tensor([1.0, 2.0, 1.0]), 4, torch.Generator()).bincount()
        tensor([1, 2, 1])
    """
    order = torch.randperm(len(weights), generator=generator)
    points = torch.arange(draws, dtype=torch.float64) + torch.rand(1, dtype=torch.float64, generator=generator)
    drawn = order[_located(weights[order], points / draws)]
    return drawn[torch.randperm(draws, generator=generator)]


def _located(weights: Tensor, points: Tensor) -> Tensor:
    """Return on which sample each point of [0, 1) falls when samples are as wide as their weights."""
    edges = weights.cumsum(0)
    last = weights.nonzero()[-1]  # rounding may put a point behind it
    return torch.searchsorted(edges, points * edges[-1], right=True).minimum(last)
