"""F1 of each class as training's mixture of classes would show it, from counts of another mixture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["F1Rates", "f1_rates"]


@dataclass(frozen=True)
class F1Rates:
    """What is known of each class; NaN for a class without samples, or that training is not fed.

    Args:
        f1: Harmonic mean of recall and precision; 0 for a class that is never predicted.
        f1_error: Its standard error.
        recall: Share of the class that is recognised.
        precision: Share of its predictions that are right; NaN where it is never predicted.
        excess: How much too often it is predicted, from -1 (never) to below 1: the difference between its shares of
            the predictions and of the samples over their sum. It has the sign of recall minus precision, and still has
            one where both are 0.
    """

    f1: tuple[float, ...]
    f1_error: tuple[float, ...]
    recall: tuple[float, ...]
    precision: tuple[float, ...]
    excess: tuple[float, ...]


def f1_rates(confusion: Sequence[Sequence[float]], prior: Sequence[float]) -> F1Rates:
    r"""Compute the F1 scores of a mixture of classes that is not the one that was counted.

    Each row of the counts is scaled to the class's share: :math:`q_{ck} = \pi_c \, n_{ck} / n_c`. The standard error is
    that of the rows as independent draws (delta method), with one hit and one miss added to each recall. Few samples of
    a frequent class make the precision of a rare one uncertain: one error then stands for many.

    Args:
        confusion: Counts by class and prediction.
        prior: Share of each class.

    Shape:
        - confusion: ``(classes, classes)``
        - prior: ``(classes,)``

    Example:
        >>> rates = f1_rates([[90, 10], [50, 50]], [0.9, 0.1])
        >>> [round(value, 2) for value in rates.f1], [round(value, 2) for value in rates.excess]
        ([0.92, 0.42], [-0.02, 0.17])
    """
    sizes = [math.fsum(row) for row in confusion]
    shares = [
        [count / size for count in row] if size > 0 else [0.0] * len(row)
        for row, size in zip(confusion, sizes, strict=True)
    ]
    scores = [_score(label, shares, sizes, prior) for label in range(len(sizes))]
    return F1Rates(*(tuple(column) for column in zip(*scores, strict=True)))


def _score(
    label: int, shares: Sequence[Sequence[float]], sizes: Sequence[float], prior: Sequence[float]
) -> tuple[float, float, float, float, float]:
    """Return F1, its standard error, recall, precision and excess of one class."""
    own, size = prior[label], sizes[label]
    if size <= 0 or own <= 0:
        return (math.nan,) * 5
    recall = shares[label][label]
    predicted = math.fsum(share * row[label] for share, row in zip(prior, shares, strict=True))
    f1 = 2 * own * recall / (own + predicted)
    smoothed = (recall * size + 1) / (size + 2)
    hits = ((2 - f1) * own) ** 2 * smoothed * (1 - smoothed) / (size + 2)
    false = (
        (f1 * prior[other]) ** 2 * row[label] * (1 - row[label]) / sizes[other]
        for other, row in enumerate(shares)
        if other != label and sizes[other] > 0
    )
    error = math.sqrt(math.fsum((hits, *false))) / (own + predicted)
    precision = own * recall / predicted if predicted > 0 else math.nan
    return f1, error, recall, precision, (predicted - own) / (predicted + own)
