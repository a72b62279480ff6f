"""What the rates of a report come down to: worst cases, gaps, means, shifts, disparities, and all intervals."""

from __future__ import annotations

import math
from functools import cached_property, partial

import torch
from torch import Tensor

from attn_callbacks._checks import one_of
from attn_callbacks.bias._rates import Rates
from attn_callbacks.bias.bootstrap import Margins, bootstrap_interval, margins_interval
from attn_callbacks.bias.fairness import Disparity, demographic_parity, equalised_odds
from attn_callbacks.bias.intervals import wilson_interval
from attn_callbacks.bias.priors import PriorShift
from attn_callbacks.bias.rates import spread

__all__ = ["DRAWN", "SCORED", "Extremes"]

SCORED = ("recall", "precision", "f1", "accuracy", "cell_recall", "group_accuracy")
"""Rates whose intervals are scores (Wilson)."""

DRAWN = (
    *("worst_class_recall", "worst_group_accuracy", "worst_cell_recall", "gap"),
    *("macro_f1", "balanced_accuracy"),
)
"""Figures whose intervals are drawn (bootstrap)."""


class Extremes(Rates):
    """Figures about several classes or groups at once; only the *estimable* ones enter a worst case or a gap."""

    @property
    def worst_class_recall(self) -> float:
        """Lowest recall among the estimable classes; NaN without one. Selects models well even without groups."""
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

    @property
    def macro_f1(self) -> float:
        """Mean F1 of the classes that are there, however few samples they have; NaN without any."""
        return float(self.f1.nanmean())

    @property
    def balanced_accuracy(self) -> float:
        """Mean recall of the classes that are there, however few samples they have; NaN without any."""
        return float(self.recall.nanmean())

    @cached_property
    def prior_shift(self) -> PriorShift:
        """Shift of the class shares between training, validation labels and predictions."""
        return PriorShift(self.training_prior, self.label_prior, self.prediction_prior)

    @cached_property
    def demographic_parity(self) -> Disparity:
        """How unequally often the groups are predicted to be of each class; NaN without two estimable groups."""
        return demographic_parity(self.counts, self.min_support)

    @cached_property
    def equalised_odds(self) -> Disparity:
        """How unequal true and false positive rates are between groups; NaN without two estimable groups."""
        return equalised_odds(self.counts, self.min_support)

    def interval(self, name: str) -> Tensor:
        """Return the 95 % interval of a rate or of a figure that follows from several.

        Rates of counts get score intervals (Wilson); worst cases, gaps and means are drawn again (bootstrap), which
        takes some milliseconds, or some tenths of a second for a thousand classes, once.

        Args:
            name: Name of the attribute, such as ``"recall"`` or ``"worst_group_accuracy"``.

        Returns:
            Lower and upper bound in the last axis, ``(..., 2)``; NaN where the figure is.

        Raises:
            ValueError: If there is no such figure.
        """
        one_of("name", name, (*SCORED, *DRAWN))
        if name not in self._intervals:
            self._intervals[name] = self._score(name) if name in SCORED else self._draw(name)
        return self._intervals[name]

    @cached_property
    def _intervals(self) -> dict[str, Tensor]:
        return {}

    def _score(self, name: str) -> Tensor:
        hits = self._hits.sum(dim=0)
        if name == "f1":  # F1 = 2 J / (1 + J), where J is a rate: hits among all that are, or are taken for, the class
            shared = wilson_interval(hits, self.class_support + self._predicted - hits)
            return (2 * shared / (1 + shared)).where((self.class_support > 0).unsqueeze(-1), torch.nan)
        counted = {
            "recall": (hits, self.class_support),
            "precision": (hits, self._predicted),
            "accuracy": (hits.sum(), self.support.sum()),
            "cell_recall": (self._hits, self.support),
            "group_accuracy": (self._hits.sum(dim=1), self.group_support),
        }
        return wilson_interval(*counted[name])

    def _draw(self, name: str) -> Tensor:
        if name == "macro_f1":
            drawn = margins_interval(self.counts.sum(dim=0, keepdim=True), _macro_f1)
        elif name == "balanced_accuracy":
            drawn = bootstrap_interval(self._outcomes(self._hits.sum(dim=0), self.class_support), _mean)
        elif not self.has_groups and name in ("worst_group_accuracy", "worst_cell_recall"):
            drawn = (math.nan, math.nan)
        else:
            drawn = self._draw_extreme(name)
        return torch.tensor(drawn, dtype=torch.float64)

    def _draw_extreme(self, name: str) -> tuple[float, float]:
        classes = name == "worst_class_recall" or (name == "gap" and not self.has_groups)
        if name == "worst_cell_recall":
            hits, support = self._hits.flatten(), self.support.flatten()
        elif classes:
            hits, support = self._hits.sum(dim=0), self.class_support
        else:
            hits, support = self._hits.sum(dim=1), self.group_support
        estimable = support >= self.min_support
        outcomes = self._outcomes(hits[estimable], support[estimable])
        if len(outcomes) < (2 if name == "gap" else 1):
            return math.nan, math.nan
        return bootstrap_interval(outcomes, partial(_extreme, gap=name == "gap"), smoothing=0.5)

    def _outcomes(self, hits: Tensor, support: Tensor) -> Tensor:
        return torch.stack([hits, support - hits], dim=-1)

    @cached_property
    def _classes(self) -> tuple[float, float]:
        return spread(self.recall, self.class_support >= self.min_support)

    @cached_property
    def _groups(self) -> tuple[float, float]:
        return spread(self.group_accuracy, self.group_support >= self.min_support)


def _macro_f1(margins: Margins) -> Tensor:
    """Mean F1 of the classes that are in each draw."""
    scores = 2 * margins.hits / (margins.support + margins.predicted)
    return scores.where(margins.support > 0, torch.nan).flatten(1).nanmean(dim=-1)


def _mean(outcomes: Tensor) -> Tensor:
    """Mean rate of tables of hits and misses, ``(draws, rates, 2)``."""
    return (outcomes[..., 0] / outcomes.sum(dim=-1)).nanmean(dim=-1)


def _extreme(outcomes: Tensor, *, gap: bool) -> Tensor:
    """Lowest rate, or highest less lowest, of tables of hits and misses, ``(draws, rates, 2)``."""
    rates = outcomes[..., 0] / outcomes.sum(dim=-1)
    lowest = rates.nan_to_num(nan=math.inf).amin(dim=-1)
    return rates.nan_to_num(nan=-math.inf).amax(dim=-1) - lowest if gap else lowest
