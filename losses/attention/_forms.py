"""Distances between attention rows and a target distribution over keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from losses.attention._mass import Degrees
from losses.attention._row_sums import cross_sums, joint_sums
from losses.attention._rows import FLOOR

__all__ = ["DISTRIBUTION_FORMS", "divergence"]

DISTRIBUTION_FORMS = ("kl", "js", "iou")
_NEAR_UNIFORM = 1e-4  # nats; a target closer to uniform than this is uniform up to rounding


def divergence(rows: Tensor, valid: Tensor | None, keys: Degrees, form: str) -> tuple[Tensor, Tensor]:
    """Return how far each row is from the target, and the sum of the row over real keys.

    The target spreads evenly over the degrees of membership; rows are renormalised over real keys. Finite, also in
    empty rows and for a set without members.

    Args:
        rows: Attention weights.
        valid: ``True`` for real tokens; ``None``: all.
        keys: The same as degrees, and to which degree they are relevant.
        form: ``"kl"``, ``"js"`` or ``"iou"``.

    Shape:
        - rows: ``(batch, heads, rows, keys)``
        - valid: ``(batch, keys)``
        - output: ``(batch, heads, rows)`` each
    """
    weights = rows.to(keys.real.dtype)
    target = keys.member / keys.member.sum(dim=1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    if form == "iou":
        return _iou(weights, valid, target)
    # Both distributions get the same small share of every real key: nothing is infinite, and equal ones stay equal.
    target = target + FLOOR * keys.real
    target = target / target.sum(dim=1, keepdim=True).clamp(min=FLOOR)
    count = keys.real.sum(dim=1)
    divide = _kl if form == "kl" else _js
    return divide(weights, valid, target, count)


def _kl(weights: Tensor, valid: Tensor | None, target: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Return the divergence of the row from the target, in units of what a uniform row costs."""
    total, cross = cross_sums(weights, valid, target, FLOOR)
    surplus = torch.special.xlogy(target, target).sum(dim=1)  # the target's entropy with a minus sign
    uniform = surplus + count.clamp(min=1).log()
    size = (total + FLOOR * count[:, None, None]).clamp(min=FLOOR)
    cost = surplus[:, None, None] + size.log() - cross
    return cost / torch.where(uniform > _NEAR_UNIFORM, uniform, 1.0)[:, None, None], total


def _js(weights: Tensor, valid: Tensor | None, target: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Jensen-Shannon divergence in bits, so that one is its largest value."""
    size, gap = joint_sums(weights, valid, target, FLOOR)
    total = size - FLOOR * count[:, None, None]
    size = size.clamp(min=FLOOR)
    surplus = torch.special.xlogy(target, target).sum(dim=1)[:, None, None]
    return 1 + (gap / size + size.log() + surplus) / (2 * math.log(2)), total


def _iou(weights: Tensor, valid: Tensor | None, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``1 - sum(min) / sum(max)``; the sums are one minus and one plus the total variation distance."""
    if valid is not None:
        weights = weights * valid[:, None, None]
    total = weights.sum(dim=-1)
    surplus = torch.addcmul(weights, total.unsqueeze(-1), target[:, None, None], value=-1).relu_()
    distance = surplus.sum(dim=-1) / total.clamp(min=FLOOR)
    return 2 * distance / (1 + distance), total
