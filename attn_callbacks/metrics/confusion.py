"""Confusion counts per group: what recall, precision and worst-group accuracy are read from."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_callbacks._checks import at_least, check_axes
from attn_callbacks.metrics.labels import LabelAccumulator, label_vector

__all__ = ["GroupConfusion"]


class GroupConfusion(LabelAccumulator):
    """Count predictions against targets, one confusion matrix a group.

    A group keeps its number whether or not a batch holds it. Integer counts: exact under any split of the data.

    Args:
        num_classes: Number of classes, at least 2.
        num_groups: Number of groups, at least 1.

    Raises:
        ValueError: If a size is too small; in `update` (on an accelerator in `compute`), if a label is out of range.
        TypeError: In `update`, if labels are not whole numbers.

    Example:
        >>> metric = GroupConfusion(num_classes=2, num_groups=2)
        >>> metric.update(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), group=torch.tensor([1, 1, 1]))
        >>> metric.compute()  # (groups, target, predicted)
        tensor([[[0, 0],
                 [0, 0]],
        <BLANKLINE>
                [[1, 1],
                 [0, 1]]])

    References:
        torchmetrics#3489: its group metrics number the groups of each batch anew, so an absent group takes the counts
        of the next.
    """

    counts: Tensor

    def __init__(self, num_classes: int, num_groups: int = 1) -> None:
        super().__init__("predicted", "target", "group")
        self.num_classes = at_least("num_classes", num_classes, 2)
        self.num_groups = at_least("num_groups", num_groups, 1)
        self.add_zeros("counts", num_groups, num_classes, num_classes, dtype=torch.int64)

    def update(self, predicted: Tensor, target: Tensor, group: Tensor | None = None) -> None:
        """Count one batch.

        Args:
            predicted: Predicted class of each sample, ``(samples,)``.
            target: Right class of each sample, ``(samples,)``. Samples with a negative target are left out.
            group: Group of each sample, ``(samples,)``; ``None`` puts all in group 0. Samples with a negative group,
                one that is not known, are left out.
        """
        check_axes("predicted", predicted, 1)
        samples = len(predicted)
        target = label_vector("target", target, samples)
        group = torch.zeros_like(target) if group is None else label_vector("group", group, samples)
        labels = torch.stack([label_vector("predicted", predicted, samples), target, group])
        counted = self.within(labels, (target >= 0) & (group >= 0))
        row, column, block = labels[1], labels[0], labels[2]
        index = (block * self.num_classes + row) * self.num_classes + column
        self.writable("counts").view(-1).scatter_add_(0, index.where(counted, 0), counted.long())

    def compute(self) -> Tensor:
        """Return the counts ``(groups, classes, classes)``, int64: group, target, predicted."""
        self.check_labels()
        return self.counts

    def label_limits(self) -> tuple[int, ...]:
        """Return the number of predicted classes, target classes and groups."""
        return self.num_classes, self.num_classes, self.num_groups
