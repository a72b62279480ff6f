"""Distances between heads added up over samples: the distance over all of them, and how sure it is."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attn_callbacks._checks import at_least, check_axes
from attn_callbacks.metrics.accumulator import Accumulator
from attn_callbacks.metrics.moments import mean_and_error

__all__ = ["HeadDistance", "HeadDistanceResult"]


class HeadDistanceResult(NamedTuple):
    """What `HeadDistance` computes; each field is ``(heads, heads)``.

    Args:
        distance: Root of the mean over samples of the squared distance, NaN without a sample. float64.
        standard_error: Standard error of ``distance``, NaN below two samples. float64.
        samples: Number of samples in which the pair has a distance. int64.
    """

    distance: Tensor
    standard_error: Tensor
    samples: Tensor


class HeadDistance(Accumulator):
    """Combine :func:`~attn_callbacks.functional.head_distance` over samples, each of which weighs the same.

    Squared distances are divergences, and divergences are what may be averaged: the root of their mean is again a
    metric, with the same range. Its standard error takes samples as independent and follows from that of the mean by
    the slope of the root; where all samples say 0, it is 0. States are sums of fixed size (24 bytes a pair), so the
    result of several processes is that of one process on all their samples. An update waits for no device.

    Args:
        heads: Number of heads, those of all layers that are compared.

    Raises:
        ValueError: If ``heads`` is below 1; in `update`, if a shape does not fit.

    Example:
        >>> metric = HeadDistance(heads=2)
        >>> metric.update(torch.tensor([[[0.0, 0.6], [0.6, 0.0]], [[0.0, 0.8], [0.8, 0.0]]]))
        >>> metric.compute().distance[0]
        tensor([0.0000, 0.7071], dtype=torch.float64)
    """

    moments: Tensor

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = at_least("heads", heads, 1)
        self.add_zeros("moments", heads, heads, 3)  # over samples: their number, sums of d ** 2 and of d ** 4

    def update(self, distances: Tensor) -> None:
        """Add one batch.

        Args:
            distances: Output of `head_distance`, ``(batch, heads, heads)``. NaN leaves that sample out of that pair.
        """
        check_axes("distances", distances, 3)
        if distances.shape[1:] != (self.heads, self.heads):
            raise ValueError(
                f"`distances` must have shape (batch, heads, heads) with {self.heads} heads, got "
                f"{tuple(distances.shape)}."
            )
        values = distances.detach().double().square()
        counted = ~values.isnan()
        values = values.where(counted, 0.0)
        self.writable("moments").add_(torch.stack([counted.double(), values, values**2], dim=-1).sum(dim=0))

    def compute(self) -> HeadDistanceResult:
        """Return distance, standard error and number of samples of every pair of heads."""
        count, first, second = self.moments.unbind(dim=-1)
        mean, error = mean_and_error(count, first, second)
        distance = mean.sqrt()
        return HeadDistanceResult(distance, error / (2 * distance.masked_fill(distance == 0, 1.0)), count.long())
