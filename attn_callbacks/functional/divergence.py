"""Jensen-Shannon distance: how far two distributions of attention lie apart, from 0 to 1."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attn_callbacks._checks import check_axes

__all__ = ["jensen_shannon", "pairwise_jensen_shannon"]


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    r"""Measure the distance between two distributions along the last axis: 0 for equal, 1 for disjoint ones.

    .. math:: \sqrt{\tfrac{1}{2 \ln 2} \sum_i p_i \ln \tfrac{2 p_i}{p_i + q_i} + q_i \ln \tfrac{2 q_i}{p_i + q_i}}

    The square root of the divergence is a metric, unlike the divergence itself. Zeros are allowed on either side.
    Bins where both are close cancel inside one term, not between two, so that small distances are exact as well.

    Args:
        p: Distribution, or any weights at least zero: they are divided by their sum.
        q: The same.

    Shape:
        - p, q: ``(..., bins)``, broadcastable
        - output: ``(...)``, float64 in [0, 1]; NaN where a side sums to zero or holds a NaN

    Raises:
        ValueError: If the numbers of bins differ.

    Example:
        >>> jensen_shannon(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([0.0, 1.0]))
        tensor([1.0000, 0.5579], dtype=torch.float64)

    References:
        Endres and Schindelin, "A New Metric for Probability Distributions", 2003.
    """
    if p.dim() == 0 or q.dim() == 0 or p.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"`p` and `q` must have as many bins along their last axis, got shapes {tuple(p.shape)} and "
            f"{tuple(q.shape)}."
        )
    p, q = (weights.double() / weights.double().sum(dim=-1, keepdim=True) for weights in (p, q))
    total = p + q
    tilt = (p - q) / total.masked_fill(total == 0, 1.0)  # in [-1, 1], so p is total * (1 + tilt) / 2
    terms: Tensor = total * (torch.special.xlog1py(1 + tilt, tilt) + torch.special.xlog1py(1 - tilt, -tilt))
    return (terms.sum(dim=-1) / (4 * math.log(2))).clamp(0.0, 1.0).sqrt()


def pairwise_jensen_shannon(distributions: Tensor) -> Tensor:
    """Measure :func:`jensen_shannon` between all pairs of rows.

    One row after the other: memory grows with the number of rows, not with its square times the bins.

    Args:
        distributions: One distribution a row.

    Shape:
        - distributions: ``(rows, bins)``
        - output: ``(rows, rows)``, float64, symmetric; NaN where a row sums to zero or holds a NaN

    Raises:
        ValueError: If ``distributions`` does not have two axes.

    Example:
        >>> pairwise_jensen_shannon(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor([[0., 1.],
                [1., 0.]], dtype=torch.float64)
    """
    check_axes("distributions", distributions, 2)
    distances = distributions.new_empty(len(distributions), len(distributions), dtype=torch.float64)
    for own, row in zip(distances, distributions, strict=True):
        own.copy_(jensen_shannon(row, distributions))
    return distances
