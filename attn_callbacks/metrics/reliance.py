"""Right and wrong before and after a region was randomised: how much of the accuracy rests on the region."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_callbacks._checks import at_least, check_axes
from attn_callbacks.metrics.labels import LabelAccumulator, label_vector

__all__ = ["RelianceCounts", "accuracy_drop"]


class RelianceCounts(LabelAccumulator):
    """Count, class by class, which predictions a change of a region of the input turned from right to wrong.

    Attention on a region is not reliance on it: a model may look at it and not use it. This counts what happens to the
    same samples when the region no longer tells anything, for example because other samples' regions took its place.

    Args:
        num_classes: Number of classes, at least 2.

    Raises:
        ValueError: If ``num_classes`` is below 2; in `update` if a shape does not fit or (on an accelerator in
            `compute`) a label is out of range.
        TypeError: In `update`, if labels are not whole numbers.

    Example:
        >>> metric = RelianceCounts(num_classes=2)
        >>> before, after = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
        >>> metric.update(before, after, target=torch.tensor([0, 0, 1, 1]))
        >>> counts = metric.compute()
        >>> counts[0]  # before wrong, right; after wrong, right
        tensor([[0, 0],
                [1, 1]])
        >>> drop, error = accuracy_drop(counts.sum(dim=0))
        >>> drop.item()
        0.5
    """

    counts: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__("before", "after", "target")
        self.num_classes = at_least("num_classes", num_classes, 2)
        self.add_zeros("counts", num_classes, 2, 2, dtype=torch.int64)

    def update(self, before: Tensor, after: Tensor, target: Tensor, present: Tensor | None = None) -> None:
        """Count one batch.

        Args:
            before: Predicted class of each sample, ``(samples,)``.
            after: Predicted class of the same samples once the region was randomised, ``(samples,)``.
            target: Right class of each sample, ``(samples,)``. Samples with a negative target are left out.
            present: ``True`` for samples that hold any of the region, ``(samples,)``; the others, which nothing was
                done to, are left out. ``None``: all hold some.
        """
        check_axes("before", before, 1)
        samples = len(before)
        named = (("before", before), ("after", after), ("target", target))
        labels = torch.stack([label_vector(name, values, samples) for name, values in named])
        kept = labels[2] >= 0
        if present is not None:
            if present.shape != (samples,):
                raise ValueError(f"`present` must have shape (samples,) = {(samples,)}, got {tuple(present.shape)}.")
            kept = kept & present.bool()
        counted = self.within(labels, kept)
        was_right, is_right = (labels[:2] == labels[2]).long()
        index = (labels[2] * 2 + was_right) * 2 + is_right
        self.writable("counts").view(-1).scatter_add_(0, index.where(counted, 0), counted.long())

    def compute(self) -> Tensor:
        """Return the counts ``(classes, 2, 2)``, int64: class, right before, right after; index 1 is right."""
        self.check_labels()
        return self.counts

    def label_limits(self) -> tuple[int, ...]:
        """Return the number of classes, for each kind of label."""
        return (self.num_classes,) * 3


def accuracy_drop(counts: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return the accuracy lost between two predictions for the same samples, and its standard error.

    .. math:: \frac{b - c}{n}, \qquad \frac{1}{n'} \sqrt{b' + c' - \frac{(b' - c')^2}{n'}}

    with ``b`` samples that were right and no longer are, and ``c`` for which it is the other way round. Only samples
    that change add to the error, which is why pairing sees smaller drops than two independent accuracies would. In the
    error, half a sample was added to each of the four counts (the primes): else a drop of zero after a handful of
    samples would look certain.

    Args:
        counts: Samples by right before and right after. Sum `RelianceCounts` over classes for the overall drop.

    Shape:
        - counts: ``(..., 2, 2)``
        - output: drop and standard error, ``(...)`` each, float64, NaN without a sample

    Raises:
        ValueError: If ``counts`` does not end in two axes of size 2.

    Example:
        >>> drop, error = accuracy_drop(torch.tensor([[[10, 2], [8, 80]]]))
        >>> drop, error
        (tensor([0.0600], dtype=torch.float64), tensor([0.0320], dtype=torch.float64))

    References:
        McNemar, "Note on the sampling error of the difference between correlated proportions or percentages", 1947.
        Agresti and Min, "Simple improved confidence intervals for comparing matched proportions", 2005.
    """
    if counts.shape[-2:] != (2, 2):
        raise ValueError(f"`counts` must have shape (..., 2, 2), got {tuple(counts.shape)}.")
    samples = counts.sum(dim=(-2, -1)).double()
    lost, won = counts[..., 1, 0].double(), counts[..., 0, 1].double()
    total, discordant = samples + 2, lost + won + 1
    error = (discordant - (lost - won) ** 2 / total).sqrt() / total
    return (lost - won) / samples, error.masked_fill(samples == 0, torch.nan)
