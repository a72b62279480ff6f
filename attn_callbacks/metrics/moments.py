"""Means and their standard errors from sums: what metrics that keep a count, a sum and a sum of squares conclude."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["mean_and_error"]


def mean_and_error(count: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean of samples and its standard error, from sums that any number of processes may have added to.

    Args:
        count: Number of samples.
        first: Sum of the values, float64.
        second: Sum of their squares, float64.

    Shape:
        - count, first, second: any, broadcastable
        - output: as broadcast; the mean is NaN without a sample, its error below two

    Example:
        >>> mean, error = mean_and_error(torch.tensor(4), torch.tensor(12.0).double(), torch.tensor(38.0).double())
        >>> mean.item(), error.item()  # of 2, 3, 4, 3
        (3.0, 0.4082...)
    """
    mean = first / count  # 0 / 0 is NaN
    variance = (second / count - mean**2).clamp_min(0.0) / (count - 1).clamp_min(1)
    return mean, variance.sqrt().masked_fill(count < 2, torch.nan)
