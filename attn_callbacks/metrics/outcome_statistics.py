"""Numbers of heads by class and outcome: what heads do on samples that are predicted wrong, and on the others."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from attn_callbacks._checks import at_least, check_axes
from attn_callbacks.functional.effect_size import Moments
from attn_callbacks.metrics.labels import LabelAccumulator, label_vector
from attn_callbacks.metrics.moments import mean_and_error

__all__ = ["OutcomeStatistics", "OutcomeStatisticsResult"]


class OutcomeStatisticsResult(NamedTuple):
    """What `OutcomeStatistics` computes; ``(layers, heads, statistics, classes, 2)``, wrong predictions first.

    Args:
        mean: Mean over samples, NaN without one. float64.
        error: Standard error of ``mean``, NaN below two samples. float64.
        moments: Count, sum and sum of squares, for :func:`attn_callbacks.functional.effect_size.effect_size`.
    """

    mean: Tensor
    error: Tensor
    moments: Moments


class OutcomeStatistics(LabelAccumulator):
    """Add up any numbers of heads, one a sample, by the sample's class and by whether it is predicted right.

    Such numbers are the `head_statistics`, and `attention_mass` on token sets. Every sample counts once, whatever its
    length. States are sums of fixed size, ``48 * classes`` bytes a head and statistic, so the result of several
    processes is that of one process on all their samples. An update waits for no device.

    Args:
        layers: Number of attention layers.
        heads: Largest number of heads of any layer; the missing heads of smaller layers stay NaN.
        statistics: Number of numbers a head.
        num_classes: Number of classes.

    Raises:
        ValueError: If a size is below 1; in `update` if a shape does not fit or (on an accelerator in `compute`) a
            target is out of range.
        TypeError: In `update`, if targets are not whole numbers.

    Example:
        >>> import torch
        >>> metric = OutcomeStatistics(layers=1, heads=1, statistics=1, num_classes=2)
        >>> values, right = torch.tensor([0.2, 0.4, 0.9]).view(3, 1, 1), torch.tensor([True, True, False])
        >>> metric.update(0, values, target=torch.tensor([0, 0, 1]), right=right)
        >>> metric.compute().mean[0, 0, 0]  # classes down; wrong, right
        tensor([[   nan, 0.3000],
                [0.9000,    nan]], dtype=torch.float64)
    """

    counts: Tensor
    sums: Tensor
    squares: Tensor

    def __init__(self, layers: int, heads: int, statistics: int, num_classes: int) -> None:
        super().__init__("target")
        sizes = {"layers": layers, "heads": heads, "statistics": statistics, "num_classes": num_classes}
        self.layers, self.heads, self.statistics, self.num_classes = (at_least(*size, 1) for size in sizes.items())
        for name in ("counts", "sums", "squares"):
            self.add_zeros(name, *sizes.values(), 2)

    def update(self, layer: int, values: Tensor, target: Tensor, right: Tensor) -> None:
        """Add one batch of one layer.

        Args:
            layer: Index of the layer.
            values: ``(batch, heads, statistics)``; NaN leaves that sample out of that statistic.
            target: Class of each sample, ``(batch,)``. Samples with a negative target are left out.
            right: ``True`` for samples that are predicted right, ``(batch,)``.
        """
        self._check(layer, values, right)
        batch, heads, _ = values.shape
        target = label_vector("target", target, batch)
        counted = self.within(target[None], target >= 0)
        cell = 2 * target.where(counted, 0) + right.long()
        wide = values.detach().double()
        known = wide.isfinite() & counted[:, None, None]
        wide = wide.where(known, 0.0)
        for name, added in (("counts", known.double()), ("sums", wide), ("squares", wide**2)):
            cells = self.writable(name)[layer, :heads].flatten(2)  # a view: (heads, statistics, classes * 2)
            cells.index_add_(2, cell, added.permute(1, 2, 0))

    def compute(self) -> OutcomeStatisticsResult:
        """Return mean, standard error and moments of every head and statistic, by class and outcome."""
        self.check_labels()
        mean, error = mean_and_error(self.counts, self.sums, self.squares)
        return OutcomeStatisticsResult(mean, error, Moments(self.counts.long(), self.sums, self.squares))

    def label_limits(self) -> tuple[int, ...]:
        """Return the number of classes."""
        return (self.num_classes,)

    def _check(self, layer: int, values: Tensor, right: Tensor) -> None:
        if not 0 <= layer < self.layers:
            raise ValueError(f"`layer` must lie between 0 and {self.layers - 1}, got {layer}.")
        check_axes("values", values, 3)
        batch, heads, statistics = values.shape
        if heads > self.heads or statistics != self.statistics:
            raise ValueError(
                f"`values` must have shape (batch, heads, statistics) with at most {self.heads} heads and "
                f"{self.statistics} statistics, got {tuple(values.shape)}."
            )
        if right.shape != (batch,):
            raise ValueError(f"`right` must have shape (batch,) = {(batch,)}, got {tuple(right.shape)}.")
