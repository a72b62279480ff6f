"""The rates that follow from the counts of a report: by class, by group, and by class within a group."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from attn_callbacks.bias.rates import rate, rate_error

__all__ = ["NO_GROUPS", "Rates"]

NO_GROUPS = ("all",)


class Rates:
    """What is counted once for each class, group or cell. A rate without support is NaN, never 0 and never "fair".

    Attributes:
        counts: Confusion counts: group, target, predicted; ``(groups, classes, classes)``.
        class_names: Name of each class.
        group_names: Name of each group.
        train_counts: Samples that training was fed, ``(groups, classes)``.
        min_support: Least number of samples behind a comparison.
    """

    counts: Tensor
    class_names: tuple[str, ...]
    group_names: tuple[str, ...]
    train_counts: Tensor | None
    min_support: int

    @property
    def has_groups(self) -> bool:
        """Samples belong to groups; else there is one implicit group."""
        return self.group_names != NO_GROUPS

    @cached_property
    def support(self) -> Tensor:
        """Number of samples, ``(groups, classes)``."""
        return self.counts.sum(dim=2)

    @cached_property
    def class_support(self) -> Tensor:
        """Number of samples of each class, ``(classes,)``."""
        return self.support.sum(dim=0)

    @cached_property
    def group_support(self) -> Tensor:
        """Number of samples of each group, ``(groups,)``."""
        return self.support.sum(dim=1)

    @cached_property
    def recall(self) -> Tensor:
        """Share of each class that is recognised, ``(classes,)``."""
        return rate(self._hits.sum(dim=0), self.class_support)

    @cached_property
    def recall_error(self) -> Tensor:
        """Standard error of :attr:`recall`, ``(classes,)``."""
        return rate_error(self.recall, self.class_support)

    @cached_property
    def precision(self) -> Tensor:
        """Share of the predictions of each class that are right, ``(classes,)``; NaN for a class never predicted."""
        return rate(self._hits.sum(dim=0), self._predicted)

    @cached_property
    def f1(self) -> Tensor:
        """Harmonic mean of recall and precision, ``(classes,)``; 0 for a class that is there and never predicted."""
        scores = rate(2 * self._hits.sum(dim=0), self.class_support + self._predicted)
        return scores.where(self.class_support > 0, torch.nan)

    @cached_property
    def accuracy(self) -> float:
        """Share of all samples that are right."""
        return float(rate(self._hits.sum(), self.support.sum()))

    @cached_property
    def label_prior(self) -> Tensor:
        """Share of each class among the targets, ``(classes,)``."""
        return rate(self.class_support, self.support.sum())

    @cached_property
    def prediction_prior(self) -> Tensor:
        """Share of each class among the predictions, ``(classes,)``."""
        return rate(self._predicted, self.support.sum())

    @cached_property
    def cell_recall(self) -> Tensor:
        """Share of each class that is recognised within each group, ``(groups, classes)``."""
        return rate(self._hits, self.support)

    @cached_property
    def group_accuracy(self) -> Tensor:
        """Share of each group that is right, ``(groups,)``."""
        return rate(self._hits.sum(dim=1), self.group_support)

    @cached_property
    def group_accuracy_error(self) -> Tensor:
        """Standard error of :attr:`group_accuracy`, ``(groups,)``."""
        return rate_error(self.group_accuracy, self.group_support)

    @cached_property
    def training_prior(self) -> Tensor:
        """Share of each class in what training was fed, ``(classes,)``; NaN where that is not known."""
        if self.train_counts is None:
            return torch.full((len(self.class_names),), torch.nan, dtype=torch.float64)
        return rate(self.train_counts.sum(dim=0), self.train_counts.sum())

    @cached_property
    def _hits(self) -> Tensor:
        return self.counts.diagonal(dim1=1, dim2=2)  # (groups, classes)

    @cached_property
    def _predicted(self) -> Tensor:
        return self.counts.sum(dim=(0, 1))  # (classes,)
