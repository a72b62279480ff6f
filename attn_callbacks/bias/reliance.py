"""Functional reliance: which outcomes change when a token set no longer tells anything."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from attn_callbacks._plain import plain
from attn_callbacks.bias._held import check_axes_of, hold
from attn_callbacks.bias.intervals import paired_interval, wilson_interval
from attn_callbacks.bias.rates import rate, rate_error
from attn_callbacks.metrics.reliance import accuracy_drop

__all__ = ["Reliance"]

_WORTH_ACTING = 0.1
"""Share of changed outcomes from which on reliance is worth acting on: declared, nothing that chance would change."""


@dataclass(frozen=True, eq=False)
class Reliance:
    """Outcomes that change when a token set is shuffled across samples: what attention mass cannot tell.

    The same samples are predicted before and after, so that only those whose outcome changed count. There are two
    questions: has accuracy fallen beyond chance (:attr:`drop`, :attr:`p_value`), and do more than one outcome in ten
    change, either way (:attr:`changed`, :attr:`changed_p_value`)? One in ten is a declared threshold of what is worth
    acting on, not what chance changes.

    Args:
        counts: Number of samples of each class by outcome before and outcome after: wrong 0, right 1.
        method: What was done to the set.

    Shape:
        - counts: ``(classes, 2, 2)``

    Raises:
        ValueError: If ``counts`` has another shape.

    Example:
        >>> reliance = Reliance(torch.tensor([[[10, 0], [30, 60]], [[20, 5], [5, 70]]]))
        >>> reliance.drop
        0.15
        >>> reliance.class_drop
        tensor([0.3000, 0.0000], dtype=torch.float64)
        >>> reliance.p_value < 1e-4
        True
    """

    counts: Tensor
    method: str = "shuffle"

    def __post_init__(self) -> None:
        check_axes_of("counts", self.counts, ("classes", 2, 2))
        hold(self, "counts", torch.int64)

    @cached_property
    def class_support(self) -> Tensor:
        """Number of samples of each class, ``(classes,)``."""
        return self.counts.sum(dim=(1, 2))

    @property
    def support(self) -> int:
        """Number of samples."""
        return int(self.counts.sum())

    @property
    def before(self) -> float:
        """Accuracy with the set as it is; NaN without samples."""
        return float(rate(self._all[1].sum(), self._all.sum()))

    @property
    def after(self) -> float:
        """Accuracy without it; NaN without samples."""
        return float(rate(self._all[:, 1].sum(), self._all.sum()))

    @property
    def drop(self) -> float:
        """Accuracy lost; NaN without samples."""
        return float(accuracy_drop(self._all)[0])

    @property
    def changed(self) -> float:
        """Share of samples whose outcome changes, either way; NaN without samples.

        Where validation is balanced over a shortcut, accuracy does not fall without it, however much decides by it.
        """
        return float(rate(self._all[1, 0] + self._all[0, 1], self._all.sum()))

    @property
    def changed_interval(self) -> tuple[float, float]:
        """95 % Wilson interval of :attr:`changed`."""
        low, high = wilson_interval(self._all[1, 0] + self._all[0, 1], self._all.sum()).tolist()
        return low, high

    @property
    def changed_error(self) -> float:
        """Standard error of :attr:`changed`."""
        return float(rate_error(torch.tensor(self.changed, dtype=torch.float64), self._all.sum()))

    @property
    def changed_p_value(self) -> float:
        """Probability that as many outcomes change, or more, if one in ten did; NaN without samples.

        One in ten is what is held to be worth acting on. It is no measurement of how many change by chance.
        """
        changed = int(self._all[1, 0] + self._all[0, 1])
        return _at_least(changed, self.support, _WORTH_ACTING) if self.support else math.nan

    @property
    def error(self) -> float:
        """Standard error of :attr:`drop`."""
        return float(accuracy_drop(self._all)[1])

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of :attr:`drop`."""
        low, high = paired_interval(self._all).tolist()
        return low, high

    @property
    def p_value(self) -> float:
        """Probability that chance changes the outcomes so unequally, either way: the exact McNemar test."""
        return _mcnemar(int(self._all[1, 0]), int(self._all[0, 1])) if self.support else math.nan

    @cached_property
    def class_drop(self) -> Tensor:
        """Recall lost by each class, ``(classes,)``; NaN without samples."""
        return accuracy_drop(self.counts)[0]

    @cached_property
    def class_error(self) -> Tensor:
        """Standard error of :attr:`class_drop`, ``(classes,)``."""
        return accuracy_drop(self.counts)[1]

    @cached_property
    def class_interval(self) -> Tensor:
        """95 % intervals of :attr:`class_drop`, ``(classes, 2)``."""
        return paired_interval(self.counts)

    def to_dict(self) -> dict[str, object]:
        """Return the counts and all that follows from them, as plain numbers, strings and lists; NaN is ``None``."""
        names = ("method", "counts", "support", "before", "after", "drop", "error", "interval", "p_value", *_CHANGED)
        return {name: plain(getattr(self, name)) for name in (*names, *_BY_CLASS)}

    @cached_property
    def _all(self) -> Tensor:
        return self.counts.sum(dim=0)  # (before, after)


_CHANGED = ("changed", "changed_error", "changed_interval", "changed_p_value")
_BY_CLASS = ("class_support", "class_drop", "class_error", "class_interval")


def _mcnemar(lost: int, gained: int) -> float:
    """Probability of a split at least this unequal of fair coins."""
    return min(1.0, 2 * _at_least(max(lost, gained), lost + gained, 0.5))


def _at_least(hits: int, trials: int, chance: float) -> float:
    """Probability of as many hits or more."""
    many = torch.arange(hits, trials + 1, dtype=torch.float64)
    ways = math.lgamma(trials + 1) - torch.lgamma(many + 1) - torch.lgamma(trials - many + 1)
    return min(1.0, float((ways + many * math.log(chance) + (trials - many) * math.log1p(-chance)).exp().sum()))
