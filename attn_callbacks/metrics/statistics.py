"""Head statistics added up over a data set: mean, clustered standard error and median of every head."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attn_callbacks._checks import at_least, check_axes
from attn_callbacks.functional.statistics import STATISTICS
from attn_callbacks.metrics.accumulator import Accumulator
from attn_callbacks.metrics.histogram import BINS, bin_index, histogram_median, statistic_edges

__all__ = ["HeadStatisticsMetric", "HeadStatisticsResult"]

_MAX_LOGIT = STATISTICS.index("max_logit")


class HeadStatisticsResult(NamedTuple):
    """What `HeadStatisticsMetric` computes; each field is ``(layers, heads, statistics)`` along `STATISTICS`.

    Args:
        mean: Mean over all rows of all samples, NaN without a sample; for ``max_logit`` the maximum. float64.
        standard_error: Standard error of ``mean``, clustered by sample; NaN below two samples and for ``max_logit``.
            float64.
        median: Median over samples of the samples' own values, to within one bin of `statistic_edges`. float64.
        samples: Number of samples that had a value. int64.
    """

    mean: Tensor
    standard_error: Tensor
    median: Tensor
    samples: Tensor


class HeadStatisticsMetric(Accumulator):
    """Add up `head_statistics` over a data set, for every layer and head.

    A sample ``s`` with the value ``m[s]`` (the mean of its rows, sampled or all) and ``w[s]`` valid queries counts with
    that weight, so that the mean is the one over all rows. Rows of one sample resemble one another; the standard error
    therefore takes the ``S`` samples, not the rows, as independent:

        mean = sum_s w[s] m[s] / sum_s w[s]
        standard_error ** 2 = S / (S - 1) * sum_s w[s] ** 2 (m[s] - mean) ** 2 / (sum_s w[s]) ** 2

    States are sums, counts and one maximum of fixed size (about 2 kB a head and statistic), so the result of several
    processes is that of one process on all their samples. An update waits for no device.

    Args:
        layers: Number of attention layers (or sites).
        heads: Largest number of heads of any layer; the missing heads of smaller layers stay NaN.

    Raises:
        ValueError: If ``layers`` or ``heads`` is below 1; in `update`, if a layer, head count or shape does not fit.

    Example:
        >>> metric = HeadStatisticsMetric(layers=2, heads=4)
        >>> metric.update(0, torch.full((8, 4, len(STATISTICS)), 0.5), weight=torch.full((8,), 12))
        >>> result = metric.compute()
        >>> result.mean[:, 0, STATISTICS.index("confidence")]
        tensor([0.5000,    nan], dtype=torch.float64)

    References:
        Cochran, "Sampling Techniques", 1977, sections 6.4 (ratio estimate) and 9A (clusters).
    """

    moments: Tensor
    histogram: Tensor
    highest: Tensor
    edges: Tensor

    def __init__(self, layers: int, heads: int) -> None:
        super().__init__()
        cells = (at_least("layers", layers, 1), at_least("heads", heads, 1), len(STATISTICS))
        self.layers, self.heads = layers, heads
        self.add_zeros("moments", *cells, 5)  # sums over samples of w, w m, w^2, w^2 m, w^2 m^2
        self.add_zeros("histogram", *cells, BINS, dtype=torch.int32)
        with torch.inference_mode(False):
            self.add_state("highest", torch.full((layers, heads), -torch.inf), dist_reduce_fx="max")
            self.register_buffer("edges", statistic_edges(), persistent=False)

    def update(self, layer: int, statistics: Tensor, weight: Tensor) -> None:
        """Add one batch of one layer.

        Args:
            layer: Index of the layer.
            statistics: Output of `head_statistics`, ``(batch, heads, statistics)``. NaN leaves that sample out of that
                statistic.
            weight: Number of valid queries of each sample, ``(batch,)``. Samples of weight 0 are left out.
        """
        self._check(layer, statistics, weight)
        heads = statistics.shape[1]
        values = statistics.detach().double()
        counted = ~values.isnan() & (weight > 0)[:, None, None]  # (batch, heads, statistics)
        values = values.where(counted, 0.0)
        weights = weight.detach().double()[:, None, None] * counted
        weighted = weights * values
        sums = (weights, weighted, weights**2, weights * weighted, weighted**2)
        self.writable("moments")[layer, :heads] += torch.stack([term.sum(dim=0) for term in sums], dim=-1)
        self._count(self.writable("histogram")[layer, :heads], values, counted)
        highest = values[..., _MAX_LOGIT].masked_fill(~counted[..., _MAX_LOGIT], -torch.inf)
        cells = self.writable("highest")[layer, :heads]
        cells.copy_(torch.cat([cells[None], highest.to(cells.dtype)]).amax(dim=0))  # an empty batch changes nothing

    def compute(self) -> HeadStatisticsResult:
        """Return mean, standard error, median and number of samples of every layer, head and statistic."""
        return self._result(self.moments, self.histogram, self.highest)

    def compute_packed(self, total: Tensor | None = None, processes: int = 1) -> Tensor:
        """Return :meth:`compute` as one tensor, without communication.

        Args:
            total: Sum of the :meth:`packed` of all processes; ``None``: of this one alone.
            processes: How many there are.

        Shape:
            - output: ``(4, layers, heads, statistics)``, float64: the fields of `HeadStatisticsResult`
        """
        states = dict(self.metric_state) if total is None else self.unpacked(total, processes)
        return torch.stack([field.double() for field in self._result(**states)])

    def _result(self, moments: Tensor, histogram: Tensor, highest: Tensor) -> HeadStatisticsResult:
        total, first, square, cross, second = moments.unbind(dim=-1)
        samples = histogram.sum(dim=-1, dtype=torch.int64)
        mean = first / total  # 0 / 0 is NaN: no sample
        spread = (second - 2 * mean * cross + mean**2 * square).clamp_min(0.0)
        error = (spread / total**2 * samples / (samples - 1).clamp_min(1)).sqrt().masked_fill(samples < 2, torch.nan)
        mean[..., _MAX_LOGIT] = highest.double().masked_fill(samples[..., _MAX_LOGIT] == 0, torch.nan)
        error[..., _MAX_LOGIT] = torch.nan
        return HeadStatisticsResult(mean, error, histogram_median(histogram, self.edges), samples)

    def _count(self, histogram: Tensor, values: Tensor, counted: Tensor) -> None:
        """Add one for each counted value to its bin of ``histogram (heads, statistics, bins)``, in place."""
        cell = torch.arange(histogram[..., 0].numel(), device=values.device).view(histogram.shape[:-1])
        index = cell * BINS + bin_index(self.edges, values)
        histogram.view(-1).scatter_add_(0, index.flatten(), counted.to(histogram.dtype).flatten())

    def _check(self, layer: int, statistics: Tensor, weight: Tensor) -> None:
        if not 0 <= layer < self.layers:
            raise ValueError(f"`layer` must lie between 0 and {self.layers - 1}, got {layer}.")
        check_axes("statistics", statistics, 3)
        batch, heads, names = statistics.shape
        if heads > self.heads:
            raise ValueError(f"`statistics` must have at most {self.heads} heads, got {heads}. Raise `heads`.")
        if names != len(STATISTICS):
            raise ValueError(f"`statistics` must hold the {len(STATISTICS)} of `STATISTICS`, got {names}.")
        if weight.shape != (batch,):
            raise ValueError(f"`weight` must have shape (batch,) = {(batch,)}, got {tuple(weight.shape)}.")
