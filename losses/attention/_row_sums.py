r"""Sums over the keys of attention rows, with gradients that take one pass.

Every sum here has a derivative of the form :math:`\alpha + \beta \varphi_j` with :math:`\alpha, \beta` numbers of the
row. A costly factor :math:`\varphi` is kept from the forward pass; autograd would keep two or three copies of the
weights instead, and go through them five times. Where the gradient is to be differentiated itself, the factor is
computed again, so second derivatives are right.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from losses.attention._mass import key_sums

__all__ = ["cross_sums", "entropy_sums", "joint_sums", "square_sums"]


def entropy_sums(rows: Tensor, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""Return :math:`\sum_j w_j` and :math:`\sum_j w_j \log w_j` of each row.

    Zero weights add nothing, and have the gradient of the smallest positive number: large, but finite.

    Args:
        rows: Weights, not negative.
        allowed: ``True`` for the keys to sum over; ``None``: all.

    Shape:
        - rows: ``(batch, heads, rows, keys)``
        - allowed: broadcastable to ``rows``
        - output: ``(batch, heads, rows)`` each
    """
    return _sums(_EntropySums, rows, allowed, None)


def square_sums(rows: Tensor, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""Return :math:`\sum_j w_j` and :math:`\sum_j w_j^2` of each row; shapes as in :func:`entropy_sums`."""
    return _sums(_SquareSums, rows, allowed, None)


def cross_sums(rows: Tensor, valid: Tensor | None, target: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    r"""Return :math:`\sum_j w_j` over real keys and :math:`\sum_j t_j \log (w_j + f)` of each row.

    Args:
        rows: Weights, not negative.
        valid: ``True`` for the real keys, over which the row is summed; ``None``: all.
        target: Distribution over the real keys.
        floor: The positive number :math:`f`.

    Shape:
        - rows: ``(batch, heads, rows, keys)``
        - valid, target: ``(batch, keys)``
        - output: ``(batch, heads, rows)`` each
    """
    return _sums(_CrossSums, rows, valid, target, floor)


def joint_sums(rows: Tensor, valid: Tensor | None, target: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    r"""Return the size and the information gap of each row and a target.

    With :math:`z_j = w_j + f` on real keys, the size is :math:`s = \sum_j z_j`, and the gap is
    :math:`\sum_j z_j \log z_j - \sum_j (z_j + s t_j) \log (z_j + s t_j)`. Shapes as in :func:`cross_sums`.
    """
    return _sums(_JointSums, rows, valid, target, floor)


def _entropy(rows: Tensor, allowed: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    factor = rows.clamp_min(torch.finfo(rows.dtype).tiny).log_()
    if allowed is None:
        return rows.sum(dim=-1), torch.linalg.vecdot(rows, factor), factor
    kept = rows * allowed
    return kept.sum(dim=-1), kept.mul_(factor).sum(dim=-1), factor


def _joint(rows: Tensor, valid: Tensor | None, target: Tensor, floor: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    smoothed = rows + floor
    size = _total(smoothed, valid)
    logarithm = torch.addcmul(smoothed, size.unsqueeze(-1), target[:, None, None]).log_()
    (cross,) = key_sums(logarithm, target)
    factor = smoothed.log().sub_(logarithm)  # zero for padding, where the target is zero
    return size, torch.linalg.vecdot(smoothed, factor) - size * cross, factor, cross


def _total(rows: Tensor, valid: Tensor | None) -> Tensor:
    return rows.sum(dim=-1) if valid is None else key_sums(rows, valid.to(rows.dtype))[0]


def _pairs(valid: Tensor | None) -> Tensor | None:
    return None if valid is None else valid[:, None, None]


def _gradient(constant: Tensor, slope: Tensor, factor: Tensor, allowed: Tensor | None) -> Tensor:
    gradient = torch.addcmul(constant.unsqueeze(-1), slope.unsqueeze(-1), factor)
    return gradient if allowed is None else gradient.mul_(allowed)


def _filled(rows: Tensor, *gradients: Tensor | None) -> list[Tensor]:
    return [rows.new_zeros(rows.shape[:-1]) if gradient is None else gradient for gradient in gradients]


class _RowFunction(Function):
    """Two differentiable sums of a row, and after them what their gradient is made of."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.floor = inputs
        ctx.set_materialize_grads(False)  # else zeros of the size of the weights, for what has no gradient
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(*tensors, *output[2:])


def _sums(function: type[_RowFunction], *inputs: Tensor | float | None) -> tuple[Tensor, Tensor]:
    first, second, *_ = function.apply(*inputs)  # type: ignore[no-untyped-call]
    return first, second


class _EntropySums(_RowFunction):
    @staticmethod
    def forward(rows: Tensor, allowed: Tensor | None, _: None) -> tuple[Tensor, Tensor, Tensor]:
        return _entropy(rows, allowed)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, allowed, factor = ctx.saved_tensors
        if torch.is_grad_enabled():
            factor = _entropy(rows, allowed)[2]
        by_total, by_weighted = _filled(rows, *gradients[:2])
        return _gradient(by_total + by_weighted, by_weighted, factor, allowed), None, None


class _SquareSums(_RowFunction):
    @staticmethod
    def forward(rows: Tensor, allowed: Tensor | None, _: None) -> tuple[Tensor, Tensor]:
        kept = rows if allowed is None else rows * allowed
        return kept.sum(dim=-1), torch.linalg.vector_norm(kept, dim=-1).square()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, allowed = ctx.saved_tensors
        by_total, by_squares = _filled(rows, *gradients)
        return _gradient(by_total, 2 * by_squares, rows, allowed), None, None


class _CrossSums(_RowFunction):
    @staticmethod
    def forward(rows: Tensor, valid: Tensor | None, target: Tensor, floor: float) -> tuple[Tensor, Tensor]:
        (cross,) = key_sums((rows + floor).log_(), target)
        return _total(rows, valid), cross

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, valid, target = ctx.saved_tensors
        by_total, by_cross = _filled(rows, *gradients)
        factor = target[:, None, None] / (rows + ctx.floor)
        return _gradient(by_total, by_cross, factor, _pairs(valid)), None, None, None


class _JointSums(_RowFunction):
    @staticmethod
    def forward(
        rows: Tensor, valid: Tensor | None, target: Tensor, floor: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _joint(rows, valid, target, floor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, valid, target, factor, cross = ctx.saved_tensors
        if torch.is_grad_enabled():
            *_, factor, cross = _joint(rows, valid, target, ctx.floor)
        by_size, by_gap = _filled(rows, *gradients[:2])
        constant = by_size - by_gap * (1 + cross)
        return _gradient(constant, by_gap, factor, _pairs(valid)), None, None, None
