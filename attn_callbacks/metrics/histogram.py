"""Histograms whose bins follow each head statistic's scale: medians from sums alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from attn_callbacks.functional.statistics import STATISTICS

__all__ = ["BINS", "bin_index", "histogram_median", "statistic_edges"]

BINS = 512
_MOST_NATS = 16.0  # nine million keys
_MOST_TOKENS = 2.0**20
_MOST_LOGIT = 65536.0  # float16 ends there


def statistic_edges(names: tuple[str, ...] = STATISTICS, bins: int = BINS) -> Tensor:
    """Return the bin edges of each statistic: equal steps of ``u`` in [0, 1], mapped to the statistic's range.

    | statistic | value at ``u`` | range | width of the bin around ``x`` |
    |---|---|---|---|
    | masses, confidence, normalised entropy | ``sin(pi u / 2) ** 2`` | [0, 1] | at most 0.0031 |
    | ``entropy`` | ``16 u ** 2`` | [0, 16] nats | 0.0157 sqrt(x) + 0.0001 |
    | ``distance`` | ``2 ** (20 u) - 1`` | [0, 1 048 575] tokens | 2.8 % of 1 + x |
    | ``max_logit`` | ``sinh(11.8 (2 u - 1))`` | [-65 536, 65 536] | 4.8 % of sqrt(1 + x ** 2) |

    Args:
        names: Statistics, in order.
        bins: Bins of each; the widths above are those of the default.

    Shape:
        - output: ``(statistics, bins + 1)``, float32, ascending

    Example:
        >>> statistic_edges(("self_mass", "distance"), bins=2)
        tensor([[0.0000e+00, 5.0000e-01, 1.0000e+00],
                [0.0000e+00, 1.0230e+03, 1.0486e+06]])
    """
    steps = torch.linspace(0.0, 1.0, bins + 1, dtype=torch.float64)
    scales: dict[str, Callable[[Tensor], Tensor]] = {
        "entropy": lambda u: _MOST_NATS * u**2,
        "distance": lambda u: _MOST_TOKENS**u - 1,
        "max_logit": lambda u: torch.sinh(math.asinh(_MOST_LOGIT) * (2 * u - 1)),
    }
    return torch.stack([scales.get(name, _unit)(steps) for name in names]).float()


def bin_index(edges: Tensor, values: Tensor) -> Tensor:
    """Return the bin of each value; what lies outside the range belongs to the first or the last bin.

    Args:
        edges: Ascending bin edges, one row a statistic.
        values: Values, statistics last. NaN goes to the last bin: leave it out of the count.

    Shape:
        - edges: ``(statistics, bins + 1)``
        - values: ``(..., statistics)``
        - output: as ``values``, int64

    Example:
        >>> bin_index(torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[-3.0], [0.5], [1.0], [9.0]]))[:, 0]
        tensor([0, 0, 1, 1])
    """
    rows = values.to(edges.dtype).reshape(-1, len(edges)).mT.contiguous()  # (statistics, values)
    return torch.searchsorted(edges[:, 1:-1].contiguous(), rows, right=True).mT.reshape(values.shape)


def histogram_median(counts: Tensor, edges: Tensor) -> Tensor:
    """Estimate medians from bin counts, to within one bin, by linear interpolation inside the bin.

    As ``numpy.median`` does, an even count takes the mean of the two values in the middle.

    Args:
        counts: Values counted in each bin.
        edges: Ascending bin edges, one row a statistic.

    Shape:
        - counts: ``(..., statistics, bins)``
        - edges: ``(statistics, bins + 1)``
        - output: ``(..., statistics)``, float64, NaN without a value

    Example:
        >>> histogram_median(torch.tensor([[1, 2, 0]]), torch.tensor([[0.0, 1.0, 2.0, 3.0]]))
        tensor([1.2500], dtype=torch.float64)
    """
    below = counts.to(torch.int64).cumsum(dim=-1)  # (..., statistics, bins): values up to and including this bin
    total = below[..., -1:]
    edges = edges.double().expand(*below.shape[:-1], -1)
    lower, upper = (_order_statistic(below, counts, edges, rank) for rank in ((total - 1) // 2, total // 2))
    return ((lower + upper) / 2).masked_fill(total == 0, torch.nan)[..., 0]


def _order_statistic(below: Tensor, counts: Tensor, edges: Tensor, rank: Tensor) -> Tensor:
    """Place the value of this rank in its bin as if the bin's values were evenly spread."""
    index = torch.searchsorted(below, rank + 1).clamp_max(below.shape[-1] - 1)
    count = counts.gather(-1, index)
    first = below.gather(-1, index) - count
    low, high = edges.gather(-1, index), edges.gather(-1, index + 1)
    return low + (high - low) * (rank - first + 0.5) / count


def _unit(steps: Tensor) -> Tensor:
    return torch.sin(math.pi / 2 * steps) ** 2
