"""Means over samples and their standard errors, added up batch by batch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["SampleMoments"]


class SampleMoments:
    """Count, sum and sum of squares of several quantities, each over the samples it was measured on.

    Args:
        shape: Axes of the quantities.

    Example:
        >>> moments = SampleMoments(2)
        >>> moments.add(torch.tensor([[1.0, 3.0], [2.0, 2.0]]))
        >>> moments.mean().tolist(), moments.standard_error().tolist()
        ([2.0, 2.0], [1.0, 0.0])
    """

    def __init__(self, *shape: int) -> None:
        self._sums = torch.zeros(3, *shape, dtype=torch.float64)

    def add(self, values: Tensor, *index: int) -> None:
        """Add ``(*shape, samples)``, or ``(samples,)`` of the quantity at ``index``; NaN is left out."""
        values = values.detach().double().cpu()
        known = ~values.isnan()
        values = values.where(known, 0.0)
        sums = torch.stack([known.double(), values, values**2]).sum(dim=-1)
        own = self._sums
        for place in index:
            own = own[:, place]
        own += sums  # a view

    @property
    def samples(self) -> Tensor:
        """Number of samples of each quantity, int64."""
        return self._sums[0].long()

    def mean(self) -> Tensor:
        """Mean of each quantity, float64; NaN without a sample."""
        return self._sums[1] / self._sums[0]

    def standard_error(self) -> Tensor:
        """Standard error of each mean, float64; NaN below two samples."""
        count, _, squares = self._sums
        variance = (squares / count - self.mean() ** 2).clamp_min(0.0) / (count - 1).clamp_min(1.0)
        error: Tensor = variance.sqrt().masked_fill(count < 2, torch.nan)
        return error
