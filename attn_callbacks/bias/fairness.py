"""Whether groups are treated alike: demographic parity and equalised odds, for any number of classes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_callbacks._plain import plain
from attn_callbacks.bias._held import hold
from attn_callbacks.bias.bootstrap import Margins, margins_interval, margins_of

__all__ = ["Disparity", "demographic_parity", "equalised_odds"]


@dataclass(frozen=True, eq=False)
class Disparity:
    """How far groups lie apart, class by class, each class against the rest.

    Groups without support are left out; a class that fewer than two groups can be compared in is NaN.

    Args:
        class_difference: Highest less lowest rate among the groups.
        class_ratio: Lowest over highest rate among the groups.
        interval: 95 % bootstrap interval of :attr:`difference`.
        support: Number of samples of the smallest rate that was compared; 0 without any.

    Shape:
        - class_difference, class_ratio: ``(classes,)``

    Example:
        >>> Disparity(torch.tensor([0.1, 0.3]), torch.tensor([0.8, 0.4]), (0.2, 0.4), 50).difference
        0.3
    """

    class_difference: Tensor
    class_ratio: Tensor
    interval: tuple[float, float]
    support: int

    def __post_init__(self) -> None:
        hold(self, "class_difference", torch.float64)
        hold(self, "class_ratio", torch.float64)

    @property
    def difference(self) -> float:
        """The largest difference; 0 is fair, NaN was not measured."""
        return float(_largest(self.class_difference))

    @property
    def ratio(self) -> float:
        """The smallest ratio; 1 is fair, NaN was not measured."""
        return -float(_largest(-self.class_ratio))

    def to_dict(self) -> dict[str, object]:
        """Return all figures as plain numbers and lists; NaN is ``None``."""
        names = ("difference", "ratio", "interval", "support", "class_difference", "class_ratio")
        return {name: plain(getattr(self, name)) for name in names}


def demographic_parity(counts: Tensor, minimum: int) -> Disparity:
    """Compare how often each class is predicted in each group, whatever the truth.

    The difference for one class is what fairlearn's ``demographic_parity_difference`` gives with that class as the
    positive one.

    Args:
        counts: Confusion counts: group, target, predicted.
        minimum: Least number of samples of a group that is compared.

    Shape:
        - counts: ``(groups, classes, classes)``

    Example:
        >>> counts = torch.tensor([[[40, 10], [20, 30]], [[20, 30], [10, 40]]])
        >>> parity = demographic_parity(counts, 20)
        >>> parity.difference, parity.class_ratio
        (0.3, tensor([0.5000, 0.5714], dtype=torch.float64))
    """
    return _disparity(counts, _prediction_rates, minimum)


def equalised_odds(counts: Tensor, minimum: int) -> Disparity:
    """Compare how often each class is predicted in each group where it is right, and where it is wrong.

    True and false positive rates are compared apart, and the worse counts; for two classes this is fairlearn's
    ``equalized_odds_difference``.

    Args:
        counts: Confusion counts: group, target, predicted.
        minimum: Least number of samples behind a rate that is compared.

    Shape:
        - counts: ``(groups, classes, classes)``

    Example:
        >>> counts = torch.tensor([[[40, 10], [20, 30]], [[20, 30], [10, 40]]])
        >>> equalised_odds(counts, 20).difference
        0.4
    """
    return _disparity(counts, _odds_rates, minimum)


Rates = tuple[Tensor, Tensor]
"""Hits and support, ``(draws, groups, rates, classes)``."""


def _prediction_rates(margins: Margins) -> Rates:
    predicted = margins.predicted.unsqueeze(-2)
    return predicted, margins.support.sum(dim=-1, keepdim=True).unsqueeze(-2).expand_as(predicted)


def _odds_rates(margins: Margins) -> Rates:
    hits, support, predicted = margins
    rest = support.sum(dim=-1, keepdim=True) - support
    return torch.stack([hits, predicted - hits], dim=-2), torch.stack([support, rest], dim=-2)


def _disparity(counts: Tensor, rates: Callable[[Margins], Rates], minimum: int) -> Disparity:
    hits, support = rates(margins_of(counts.unsqueeze(0)))
    compared = support >= minimum
    compared = compared & (compared.sum(dim=1, keepdim=True) > 1)  # with another group
    difference, ratio = _apart(hits, support, compared)
    smallest = support[compared]

    def redrawn(margins: Margins) -> Tensor:
        hits, support = rates(margins)
        return _largest(_apart(hits, support, compared & (support > 0))[0])

    interval = margins_interval(counts, redrawn)
    return Disparity(difference[0], ratio[0], interval, int(smallest.min()) if len(smallest) else 0)


def _apart(hits: Tensor, support: Tensor, compared: Tensor) -> Rates:
    """Difference and ratio of the highest and the lowest rate of the groups, ``(draws, classes)``; NaN without any."""
    rate = hits.double() / support.double()
    high, low = rate.where(compared, -math.inf).amax(dim=1), rate.where(compared, math.inf).amin(dim=1)
    known = compared.any(dim=1)
    difference, ratio = (high - low).where(known, torch.nan), (low / high).where(known, torch.nan)
    return _largest(difference, -2), -_largest(-ratio, -2)


def _largest(values: Tensor, dim: int = -1) -> Tensor:
    """Largest value that is not NaN; NaN without one."""
    largest = values.nan_to_num(nan=-math.inf).amax(dim=dim)
    return largest.where(~values.isnan().all(dim=dim), torch.nan)
