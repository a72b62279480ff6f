"""Student's t distribution from torch alone: p-values of many tests at once, to about twelve digits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["student_p"]

_MOST_STEPS = 1000
_NEAR_NORMAL = 1e5  # degrees of freedom from which on more make no difference that anybody reads
_LARGE = 50.0  # from which on the series of the gamma function is exact
_TINY = 1e-300


def student_p(t: Tensor, degrees: Tensor) -> Tensor:
    """Return how probable a ``t`` of that size or larger, of either sign, is by chance.

    Args:
        t: Difference over its standard error.
        degrees: Degrees of freedom, above 0; more than 100 000 count as so many.

    Shape:
        - t, degrees: any, broadcastable
        - output: as broadcast, float64; NaN stays NaN

    Example:
        >>> student_p(torch.tensor([2.0, -2.0, 0.0]), torch.tensor([10.0]))
        tensor([0.0734, 0.0734, 1.0000], dtype=torch.float64)
    """
    t, degrees = torch.broadcast_tensors(t.double(), degrees.double().clamp_max(_NEAR_NORMAL))
    known = ~(t.isnan() | degrees.isnan())
    size, freedom = t.abs().where(known, 0.0), degrees.where(known, 1.0)
    chance = _incomplete_beta(freedom / 2, size**2 / freedom)
    return chance.clamp(0.0, 1.0).where(known, torch.nan)


def _incomplete_beta(a: Tensor, odds: Tensor) -> Tensor:
    """Return the regularised incomplete beta function of ``a`` and 1/2, by whichever of its two fractions is fast.

    At ``x = 1 / (1 + odds)``: given by its odds, neither ``x`` near one nor the rest near zero loses digits.
    """
    half = torch.full_like(a, 0.5)
    x, rest = 1 / (1 + odds), 1 / (1 + 1 / odds)
    turned = x > (a + 1) / (a + 2.5)
    fraction = _fraction(torch.where(turned, half, a), torch.where(turned, a, half), torch.where(turned, rest, x))
    front = (_gamma_ratio(a) - 0.5 * math.log(math.pi) - a * torch.log1p(odds)).exp() * rest.sqrt()
    return torch.where(turned, 1 - 2 * front * fraction, front * fraction / a)


def _gamma_ratio(a: Tensor) -> Tensor:
    """Return the logarithm of ``gamma(a + 1 / 2) / gamma(a)``; two large logarithms would cancel."""
    inverse = 1 / a
    series = 0.5 * a.log() - inverse / 8 + inverse**3 / 192 - inverse**5 / 640
    return series.where(a > _LARGE, torch.lgamma(a + 0.5) - torch.lgamma(a))


def _fraction(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """Evaluate the continued fraction of the incomplete beta function from its head on (Lentz' method)."""
    upper = torch.ones_like(x)
    lower = 1 / _away_from_zero(1 - (a + b) * x / (a + 1))
    found = lower.clone()
    for step in range(1, _MOST_STEPS):
        even = step * (b - step) * x / ((a + 2 * step - 1) * (a + 2 * step))
        odd = -(a + step) * (a + b + step) * x / ((a + 2 * step) * (a + 2 * step + 1))
        change = torch.ones_like(x)
        for term in (even, odd):
            lower = 1 / _away_from_zero(1 + term * lower)
            upper = _away_from_zero(1 + term / upper)
            change = lower * upper
            found = found * change
        if bool(((change - 1).abs() < 1e-13).all()):
            break
    return found


def _away_from_zero(values: Tensor) -> Tensor:
    return values.where(values.abs() > _TINY, _TINY)
