"""What the bias monitor saw on one validation pass: counts, and every rate that follows from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from attn_callbacks._checks import at_least
from attn_callbacks.bias.finding import Finding, attention_findings, cell_findings, rate_findings
from attn_callbacks.bias.rates import rate, rate_error, spread
from attn_callbacks.bias.share import AttentionShare
from attn_callbacks.bias.text import summary_text

__all__ = ["BiasReport"]

NO_GROUPS = ("all",)

_RATES = (
    *("support", "class_support", "recall", "recall_error", "precision", "f1", "accuracy", "label_prior"),
    *("prediction_prior", "cell_recall", "group_support", "group_accuracy", "group_accuracy_error"),
    *("worst_class_recall", "worst_group_accuracy", "worst_cell_recall", "gap"),
)


@dataclass(frozen=True, eq=False)
class BiasReport:
    """Validation counts by group, class and prediction, and the rates and findings that follow from them.

    Counts are held as int64 and rates computed as float64, both on the CPU: equal counts give equal numbers on every
    device. A rate without support is NaN, never 0 and never "fair". *Estimable* is what has ``min_support`` samples;
    only that enters a worst case, a gap or a finding.

    Args:
        epoch: Epoch of the validation pass.
        step: Optimiser steps taken before it.
        counts: Confusion counts: group, target, predicted.
        class_names: Name of each class.
        group_names: Name of each group; ``("all",)`` where samples have no groups.
        train_counts: Number of samples of each group and class that training was fed so far.
        attention: Attention on the token sets ``"relevance"`` and ``"spurious"``, where they are annotated.
        min_support: Least number of samples behind a comparison, at least 1.

    Shape:
        - counts: ``(groups, classes, classes)``
        - train_counts: ``(groups, classes)``

    Raises:
        ValueError: If shapes and names do not fit together, or ``min_support`` is below 1.

    Example:
        >>> counts = torch.tensor([[[90, 10], [40, 60]]])
        >>> report = BiasReport(epoch=0, step=100, counts=counts, class_names=("negative", "positive"))
        >>> report.recall
        tensor([0.9000, 0.6000], dtype=torch.float64)
        >>> [(finding.kind, finding.where, round(finding.size, 2)) for finding in report.findings]
        [('class', 'positive', 0.3)]
    """

    epoch: int
    step: int
    counts: Tensor
    class_names: tuple[str, ...]
    group_names: tuple[str, ...] = NO_GROUPS
    train_counts: Tensor | None = None
    attention: Mapping[str, AttentionShare] = field(default_factory=dict)
    min_support: int = 20

    def __post_init__(self) -> None:
        at_least("min_support", self.min_support, 1)
        cells = (len(self.group_names), len(self.class_names))
        self._check("counts", self.counts, (*cells, cells[1]), "(groups, classes, classes)")
        self._own("counts", self.counts)
        if self.train_counts is not None:
            self._check("train_counts", self.train_counts, cells, "(groups, classes)")
            self._own("train_counts", self.train_counts)
        for name, share in self.attention.items():
            self._check(f"attention[{name!r}]", share.mass, cells[1:], "(classes,)")
        object.__setattr__(self, "attention", dict(self.attention))

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

    @property
    def worst_class_recall(self) -> float:
        """Lowest recall among the estimable classes; NaN without one."""
        return self._classes[0]

    @property
    def worst_group_accuracy(self) -> float:
        """Lowest accuracy among the estimable groups; NaN without one, and without groups."""
        return self._groups[0] if self.has_groups else math.nan

    @property
    def worst_cell_recall(self) -> float:
        """Lowest recall of an estimable class within a group; NaN without one, and without groups.

        The one to watch where groups are correlated with classes: group accuracy hides a rare class.
        """
        return spread(self.cell_recall, self.support >= self.min_support)[0] if self.has_groups else math.nan

    @property
    def gap(self) -> float:
        """Best minus worst group accuracy, or class recall without groups; NaN with fewer than two estimable ones."""
        support = self.group_support if self.has_groups else self.class_support
        worst, best = self._groups if self.has_groups else self._classes
        return best - worst if int((support >= self.min_support).sum()) > 1 else math.nan

    @cached_property
    def findings(self) -> tuple[Finding, ...]:
        """Shortfalls beyond the dead band (0.02) and two standard errors, the largest first.

        One in forty comparisons passes two standard errors by chance: expect a few among hundreds of classes.
        """
        minimum = self.min_support
        found = list(rate_findings("class", self.class_names, self.recall, self.class_support, minimum))
        if self.has_groups:
            found += rate_findings("group", self.group_names, self.group_accuracy, self.group_support, minimum)
            found += cell_findings(self.group_names, self.class_names, self.cell_recall, self.support, minimum)
        found += attention_findings(self.class_names, self.attention, minimum)
        return tuple(sorted(found, key=lambda finding: -finding.size))

    def to_dict(self) -> dict[str, object]:
        """Return everything as plain numbers, strings, lists and dicts that JSON can hold; NaN becomes ``None``."""
        names = ("epoch", "step", "min_support", "class_names", "group_names", "counts", "train_counts", *_RATES)
        values = {name: _plain(getattr(self, name)) for name in names}
        values["attention"] = {name: _plain(share.to_dict()) for name, share in self.attention.items()}
        values["findings"] = [_plain(asdict(finding)) for finding in self.findings]
        return values

    def summary(self) -> str:
        """Return a text that reads well in a terminal and, as Markdown, in TensorBoard."""
        return summary_text(self)

    @cached_property
    def _hits(self) -> Tensor:
        return self.counts.diagonal(dim1=1, dim2=2)  # (groups, classes)

    @cached_property
    def _predicted(self) -> Tensor:
        return self.counts.sum(dim=(0, 1))  # (classes,)

    @cached_property
    def _classes(self) -> tuple[float, float]:
        return spread(self.recall, self.class_support >= self.min_support)

    @cached_property
    def _groups(self) -> tuple[float, float]:
        return spread(self.group_accuracy, self.group_support >= self.min_support)

    def _own(self, name: str, tensor: Tensor) -> None:
        # a copy: the accumulator it came from goes on counting
        object.__setattr__(self, name, tensor.detach().to("cpu", torch.int64, copy=True))

    def _check(self, name: str, tensor: Tensor, expected: tuple[int, ...], axes: str) -> None:
        if tuple(tensor.shape) != expected:
            raise ValueError(
                f"`{name}` must have shape {axes} = {expected}, got {tuple(tensor.shape)}: `group_names` has "
                f"{len(self.group_names)} names, `class_names` {len(self.class_names)}."
            )


def _plain(value: object) -> object:
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
