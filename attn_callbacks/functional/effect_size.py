"""How far two groups of samples lie apart: a standardised difference with its interval, and a test, from moments."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attn_callbacks.functional._student import student_p

__all__ = ["EffectSize", "Moments", "effect_size", "moments"]

_RESOLUTION = 1e-6
"""Spread, relative to the size of the values, below which float32 statistics differ by rounding alone."""


class Moments(NamedTuple):
    """What is known of a group: enough for its mean and its variance, and added up by adding each field.

    Args:
        samples: Number of samples.
        first: Sum of their values, float64.
        second: Sum of their squares, float64.
    """

    samples: Tensor
    first: Tensor
    second: Tensor


class EffectSize(NamedTuple):
    """What `effect_size` computes; all float64 and NaN where a group has fewer than two samples.

    Args:
        difference: Mean of the first group less mean of the second, in the unit of the values.
        g: The same in standard deviations (Hedges' g).
        standard_error: Standard error of ``g``.
        low: Lower end of the interval of ``g``.
        high: Upper end.
        p_value: How probable so large a difference of means is by chance (Welch's test), before any correction for
            the number of comparisons.
    """

    difference: Tensor
    g: Tensor
    standard_error: Tensor
    low: Tensor
    high: Tensor
    p_value: Tensor


def moments(values: Tensor, dim: int = 0) -> Moments:
    """Sum up samples for `effect_size`.

    Args:
        values: One value a sample; NaN where a sample has none.
        dim: Axis of the samples.

    Example:
        >>> [field.item() for field in moments(torch.tensor([1.0, 3.0, torch.nan]))]
        [2, 4.0, 10.0]
    """
    known = ~values.isnan()
    filled = values.detach().double().where(known, 0.0)
    return Moments(known.sum(dim=dim), filled.sum(dim=dim), (filled**2).sum(dim=dim))


def effect_size(group: Moments, others: Moments, *, confidence: float = 0.95) -> EffectSize:
    r"""Compare the means of two independent groups of samples.

    .. math:: g = J \frac{\bar x_1 - \bar x_2}{s}, \quad
        s^2 = \frac{(n_1 - 1) s_1^2 + (n_2 - 1) s_2^2}{n_1 + n_2 - 2}, \quad
        J = \frac{\Gamma(m / 2)}{\sqrt{m / 2}\, \Gamma((m - 1) / 2)}, \quad m = n_1 + n_2 - 2

    with the standard error :math:`J \sqrt{(n_1 + n_2) / (n_1 n_2) + (g / J)^2 / (2 (n_1 + n_2))}` and the interval of
    the normal distribution. The p-value is that of Welch's test, which lets the groups have different variances.
    0.2 is called small, 0.5 medium, 0.8 large (Cohen): words, not limits. Of many comparisons correct the p-values
    (:func:`attn_callbacks.bias.holm`).

    A group whose samples are all alike is taken to spread by a millionth of its values, which is what statistics in
    float32 tell apart. All cells at once; waits for the device a few times.

    Args:
        group: The group of interest.
        others: The group it is compared with.
        confidence: Coverage of the interval.

    Shape:
        - fields of ``group`` and ``others``: any, broadcastable, such as ``(layers, heads, statistics)``
        - output: as broadcast

    Raises:
        ValueError: If ``confidence`` does not lie between 0 and 1.

    Example:
        >>> found = effect_size(moments(torch.tensor([4.0, 5.0, 6.0])), moments(torch.tensor([1.0, 2.0, 3.0])))
        >>> [round(field.item(), 3) for field in (found.difference, found.g, found.standard_error, found.p_value)]
        [3.0, 2.394, 0.95, 0.021]

    References:
        Hedges, "Distribution Theory for Glass's Estimator of Effect Size and Related Estimators", 1981; Borenstein et
        al., "Introduction to Meta-Analysis", 2009, chapter 4 (standard error); Welch, "The Generalization of
        'Student's' Problem when Several Different Population Variances are Involved", 1947.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must lie between 0 and 1, got {confidence}.")
    (first, first_mean, first_variance), (second, second_mean, second_variance) = _described(group), _described(others)
    difference = first_mean - second_mean
    freedom = first + second - 2
    pooled = ((first - 1) * first_variance + (second - 1) * second_variance) / freedom
    correction = _small_sample(freedom)
    d = difference / pooled.sqrt()
    error = correction * ((first + second) / (first * second) + d**2 / (2 * (first + second))).sqrt()
    g = correction * d
    reach = torch.special.ndtri(g.new_tensor((1 + confidence) / 2)) * error
    shares = first_variance / first, second_variance / second
    variance = shares[0] + shares[1]
    welch = variance**2 / (shares[0] ** 2 / (first - 1) + shares[1] ** 2 / (second - 1))
    return EffectSize(difference, g, error, g - reach, g + reach, student_p(difference / variance.sqrt(), welch))


def _described(group: Moments) -> tuple[Tensor, Tensor, Tensor]:
    """Return count, mean and variance, NaN below two samples."""
    count = group.samples.double()
    count = count.where(count >= 2, torch.nan)
    mean, square = group.first.double() / count, group.second.double() / count
    variance = (square - mean**2).clamp_min(0.0) * count / (count - 1)
    floor = (_RESOLUTION**2 * square).clamp_min(torch.finfo(torch.float64).tiny)  # values that are all zero, too
    return count, mean, torch.maximum(variance, floor)


def _small_sample(freedom: Tensor) -> Tensor:
    """Return what takes the bias out of a standardised difference."""
    half = freedom / 2
    return (torch.lgamma(half) - torch.lgamma(half - 0.5)).exp() / half.sqrt()
