"""Attention mass on a token set, class by class: which class leans on which words or patches."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attn_callbacks._checks import at_least
from attn_callbacks.metrics.labels import LabelAccumulator, label_vector
from attn_callbacks.metrics.moments import mean_and_error

__all__ = ["ClassMass", "ClassMassResult"]


class ClassMassResult(NamedTuple):
    """What `ClassMass` computes: by class, and by class and outcome, wrong predictions first.

    Args:
        mass: Mean attention mass on the set, ``(classes,)``, NaN for a class without a sample. float64.
        lift: Mean mass over mean share, ``(classes,)``: 1 is chance. float64.
        support: Number of samples that counted, ``(classes,)``. int64.
        error: Standard error of ``mass``, ``(classes,)``, NaN below two samples. float64.
        outcome_mass: As ``mass``, ``(classes, 2)``, for the samples whose outcome was given.
        outcome_support: As ``support``, ``(classes, 2)``.
        outcome_error: As ``error``, ``(classes, 2)``.
        share: Mean share of the set among the valid tokens, ``(classes,)``: the mass that is chance. float64.
    """

    mass: Tensor
    lift: Tensor
    support: Tensor
    error: Tensor
    outcome_mass: Tensor
    outcome_support: Tensor
    outcome_error: Tensor
    share: Tensor


class ClassMass(LabelAccumulator):
    """Average the attention mass on a token set, for the samples of each class, and for right and wrong predictions.

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
        >>> right = torch.tensor([True, False, True])
        >>> metric.update(torch.tensor([0.2, 0.4, 0.5]), torch.tensor([0.1, 0.1, 0.5]), torch.tensor([0, 0, 1]), right)
        >>> result = metric.compute()
        >>> result.mass.tolist(), result.lift.tolist(), result.support.tolist()
        ([0.30..., 0.5], [3.0..., 1.0], [2, 1])
        >>> result.outcome_mass.tolist()  # wrong, right
        [[0.40..., 0.20...], [nan, 0.5]]
    """

    sums: Tensor
    support: Tensor
    squares: Tensor
    outcome_sums: Tensor
    outcome_support: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__("target")
        self.num_classes = at_least("num_classes", num_classes, 2)
        self.add_zeros("sums", num_classes, 2)  # mass, share
        self.add_zeros("support", num_classes, dtype=torch.int64)
        self.add_zeros("squares", num_classes)  # mass ** 2
        self.add_zeros("outcome_sums", num_classes, 2, 2)  # wrong and right: mass, mass ** 2
        self.add_zeros("outcome_support", num_classes, 2, dtype=torch.int64)

    def update(self, mass: Tensor, share: Tensor, target: Tensor, right: Tensor | None = None) -> None:
        """Add one batch.

        Args:
            mass: `attention_mass` of each sample, ``(batch,)``, or ``(batch, heads)`` to average over heads. A sample
                without any defined mass is left out.
            share: `target_share` of each sample, ``(batch,)``.
            target: Class of each sample, ``(batch,)``. Samples with a negative target are left out.
            right: ``True`` for samples that are predicted right, ``(batch,)``; ``None``: not known, so that the batch
                counts for its classes alone.
        """
        if mass.dim() not in (1, 2):
            raise ValueError(f"`mass` must have shape (batch,) or (batch, heads), got {tuple(mass.shape)}.")
        for name, values in (("share", share), ("right", right)):
            if values is not None and values.shape != mass.shape[:1]:
                raise ValueError(
                    f"`{name}` must have shape (batch,) = {tuple(mass.shape[:1])}, got {tuple(values.shape)}."
                )
        target = label_vector("target", target, len(mass))
        values = mass.detach().double()
        values = values if values.dim() == 1 else values.nanmean(dim=1)
        counted = self.within(target[None], (target >= 0) & ~values.isnan() & (share > 0))
        added = torch.stack([values, share.detach().double(), values**2], dim=1).where(counted[:, None], 0.0)
        index = target.where(counted, 0)
        self.writable("sums").index_add_(0, index, added[:, :2])
        self.writable("squares").index_add_(0, index, added[:, 2])
        self.writable("support").index_add_(0, index, counted.long())
        known = counted if right is not None else torch.zeros_like(counted)
        outcome = index * 2 if right is None else index * 2 + right.long()
        added = added[:, ::2].where(known[:, None], 0.0)  # mass, mass ** 2
        self.writable("outcome_sums").view(-1, 2).index_add_(0, outcome, added)
        self.writable("outcome_support").view(-1).index_add_(0, outcome, known.long())

    def compute(self) -> ClassMassResult:
        """Return mean mass, lift and share of every class, and the mean mass of its wrong and right predictions."""
        self.check_labels()
        first, share = self.sums.unbind(dim=-1)
        mass, error = mean_and_error(self.support, first, self.squares)
        by_class = (mass, first / share, self.support, error)
        by_outcome = mean_and_error(self.outcome_support, *self.outcome_sums.unbind(dim=-1))
        return ClassMassResult(*by_class, by_outcome[0], self.outcome_support, by_outcome[1], share / self.support)

    def label_limits(self) -> tuple[int, ...]:
        """Return the number of classes."""
        return (self.num_classes,)
