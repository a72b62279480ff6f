"""Student's t distribution from torch alone: p-values of many tests at once, to about twelve digits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["student_p"]

_MOST_STEPS = 1000
_NEAR_NORMAL = 1e5  # degrees of freedom from which on more make no difference that anybody reads
_TINY = 1e-300


def student_p(t: Tensor, degrees: Tensor) -> Tensor:
    """Return how probable a ``t`` of that size or larger, of either sign, is by chance.

    Args:
        t: Difference over its standard error.
        degrees: Degrees of freedom, above 0.

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
    chance = _incomplete_beta(freedom / 2, 0.5, freedom / (freedom + size**2))
    return chance.clamp(0.0, 1.0).where(known, torch.nan)


def _incomplete_beta(a: Tensor, b: float, x: Tensor) -> Tensor:
    """Return the regularised incomplete beta function, by whichever of its two fractions converges fast."""
    second = torch.full_like(a, b)
    turned = x > (a + 1) / (a + b + 2)
    fraction = _fraction(torch.where(turned, second, a), torch.where(turned, a, second), torch.where(turned, 1 - x, x))
    scale = torch.lgamma(a + b) - torch.lgamma(a) - math.lgamma(b)
    front = (scale + torch.xlogy(a, x) + torch.xlogy(second, 1 - x)).exp()
    return torch.where(turned, 1 - front * fraction / b, front * fraction / a)


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
