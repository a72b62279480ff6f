"""Attention mass on a token set, class by class: which class leans on which words or patches."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attn_callbacks._checks import at_least
from attn_callbacks.metrics.labels import LabelAccumulator, label_vector

__all__ = ["ClassMass", "ClassMassResult"]


class ClassMassResult(NamedTuple):
    """What `ClassMass` computes; each field is ``(classes,)``.

    Args:
        mass: Mean attention mass on the set, NaN for a class without a sample. float64.
        lift: Mean mass over mean share: 1 is chance. float64.
        support: Number of samples that counted. int64.
    """

    mass: Tensor
    lift: Tensor
    support: Tensor


class ClassMass(LabelAccumulator):
    """Average the attention mass on a token set, for the samples of each class.

    The lift of a class is the sum of its samples' masses over the sum of the set's shares of their valid tokens: unlike
    a mean of ratios, it is not run by samples in which the set is tiny. Samples that hold no token of the set say
    nothing about it and are left out.

    Args:
        num_classes: Number of classes, at least 2.

    Raises:
        ValueError: If ``num_classes`` is below 2; in `update` if a shape does not fit or (on an accelerator in
            `compute`) a target is out of range.

    Example:
        >>> metric = ClassMass(num_classes=2)
        >>> metric.update(torch.tensor([0.2, 0.4, 0.5]), torch.tensor([0.1, 0.1, 0.5]), torch.tensor([0, 0, 1]))
        >>> mass, lift, support = metric.compute()
        >>> mass.tolist(), lift.tolist(), support.tolist()  # doctest: +ELLIPSIS
        ([0.30000..., 0.5], [3.0..., 1.0], [2, 1])
    """

    sums: Tensor
    support: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__("target")
        self.num_classes = at_least("num_classes", num_classes, 2)
        self.add_zeros("sums", num_classes, 2)  # mass, share
        self.add_zeros("support", num_classes, dtype=torch.int64)

    def update(self, mass: Tensor, share: Tensor, target: Tensor) -> None:
        """Add one batch.

        Args:
            mass: `attention_mass` of each sample, ``(batch,)``, or ``(batch, heads)`` to average over heads. A sample
                without any defined mass is left out.
            share: `target_share` of each sample, ``(batch,)``.
            target: Class of each sample, ``(batch,)``. Samples with a negative target are left out.
        """
        if mass.dim() not in (1, 2):
            raise ValueError(f"`mass` must have shape (batch,) or (batch, heads), got {tuple(mass.shape)}.")
        if share.shape != mass.shape[:1]:
            raise ValueError(f"`share` must have shape (batch,) = {tuple(mass.shape[:1])}, got {tuple(share.shape)}.")
        target = label_vector("target", target, len(mass))
        values = mass.detach().double()
        values = values if values.dim() == 1 else values.nanmean(dim=1)
        counted = self.within(target[None], (target >= 0) & ~values.isnan() & (share > 0))
        pairs = torch.stack([values, share.detach().double()], dim=1).where(counted[:, None], 0.0)
        index = target.where(counted, 0)
        self.writable("sums").index_add_(0, index, pairs)
        self.writable("support").index_add_(0, index, counted.long())

    def compute(self) -> ClassMassResult:
        """Return mean mass, lift and support of every class."""
        self.check_labels()
        mass, share = self.sums.unbind(dim=1)
        return ClassMassResult(mass / self.support, mass / share, self.support)

    def label_limits(self) -> tuple[int, ...]:
        """Return the number of classes."""
        return (self.num_classes,)
