"""Keep the attention of two views of one sample together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from losses._checks import REDUCTIONS, check_shape, one_of
from losses.attention._layers import as_layers, layer_mean, reduce_layers, widened
from losses.attention._mass import key_sums
from losses.attention._rows import FLOOR, check_query_valid, check_valid, counted_rows, real_rows

__all__ = ["AttentionConsistencyLoss", "attention_consistency"]


def attention_consistency(
    weights: Tensor | Sequence[Tensor],
    other: Tensor | Sequence[Tensor],
    valid: Tensor | None = None,
    *,
    query_valid: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Compute the Jensen-Shannon divergence between the attention of two views of the same samples.

    .. math::
        \ell = \frac{1}{2 \ln 2} \left( \operatorname{KL}(p \,\|\, m) + \operatorname{KL}(q \,\|\, m) \right),
        \qquad m = \frac{p + q}{2}

    for each row, with :math:`p` and :math:`q` the shares of a row's weights on real keys; 0 where both views attend
    alike, 1 where they share no key. Averaged over the rows and heads in which both views attend to something, then
    over layers, then over samples. It asks attention to be stable, not right: add it to a loss that says where to look.

    Two views are two passes with dropout, or two augmentations that keep every token in its place. The gradient goes
    to both; pass ``other.detach()`` where the second view is a teacher. Three logarithms for each pair of weights.

    Args:
        weights: Attention weights after the softmax, of one layer or of several.
        other: The weights of the other view, layer by layer.
        valid: ``True`` for real tokens, ``False`` for padding; ``None`` takes every key. Where ``queries == keys`` and
            no ``query_valid`` is given, it also leaves out the rows of padding.
        query_valid: ``True`` for the real tokens among the queries of cross-attention. ``None`` takes a layer with
            ``queries == keys`` for self-attention, whose queries are the tokens that keys are, and every other for
            cross-attention between real queries: pass it wherever cross-attention may have as many queries as keys.
        reduction: ``"mean"`` over samples, ``"sum"`` or ``"none"``.

    Shape:
        - weights, other: ``(batch, heads, queries, keys)``; heads and queries may differ between layers
        - valid: ``(batch, keys)``
        - query_valid: ``(batch, queries)``
        - output: scalar, or ``(batch,)`` for ``reduction="none"``; in ``[0, 1]`` up to rounding

    Raises:
        ValueError: If there is no layer, the views differ in their layers or shapes, a mask does not fit or (checked on
            the CPU only) has values outside ``[0, 1]``, or the weights are not those after a softmax.
        TypeError: If a view holds something else than floating tensors.

    Example:
        >>> scores = torch.zeros(1, 1, 1, 2, requires_grad=True)
        >>> loss = attention_consistency(scores.softmax(dim=-1), torch.tensor([[[[1.0, 0.0]]]]))
        >>> loss
        tensor(0.3113, grad_fn=<DivBackward0>)
        >>> loss.backward()
        >>> scores.grad[0, 0, 0]
        tensor([-0.1981,  0.1981])

    References:
        Lin, "Divergence Measures Based on the Shannon Entropy", IEEE Transactions on Information Theory 37, 1991.
    """
    one_of("reduction", reduction, REDUCTIONS)
    layers, others = as_layers(weights), as_layers(other, "other")
    if len(layers) != len(others):
        raise ValueError(f"`other` must have the {len(layers)} layers of `weights`, got {len(others)}.")
    valid, query_valid = check_valid(valid, layers[0]), check_query_valid(query_valid, layers)
    with torch.autocast(layers[0].device.type, enabled=False):
        costs = []
        for index, (first, second) in enumerate(zip(layers, others, strict=True)):
            check_shape(f"other[{index}]", second, first.shape, f"of `weights[{index}]`")
            costs.append(_layer_cost(first, second, valid, query_valid))
        return reduce_layers(costs, None, reduction)


class AttentionConsistencyLoss(nn.Module):
    """Pull the attention of two views together; see :func:`attention_consistency`.

    Args:
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Shape:
        - forward: as :func:`attention_consistency`

    Raises:
        ValueError: If ``reduction`` is not among the allowed ones.

    Example:
        >>> consistency = AttentionConsistencyLoss()
        >>> student = torch.zeros(1, 2, 3, 3, requires_grad=True)
        >>> teacher = torch.eye(3).expand(1, 2, 3, 3)
        >>> loss = consistency(student.softmax(dim=-1), teacher)
        >>> loss.backward()
        >>> loss
        tensor(0.4591, grad_fn=<DivBackward0>)
    """

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = one_of("reduction", reduction, REDUCTIONS)

    def forward(
        self,
        weights: Tensor | Sequence[Tensor],
        other: Tensor | Sequence[Tensor],
        valid: Tensor | None = None,
        *,
        query_valid: Tensor | None = None,
    ) -> Tensor:
        """Return the divergence between the attention ``weights`` and those of the ``other`` view."""
        return attention_consistency(weights, other, valid, query_valid=query_valid, reduction=self.reduction)

    def extra_repr(self) -> str:
        """Show how to build the loss again."""
        return f"reduction={self.reduction!r}"


def _layer_cost(
    first: Tensor, second: Tensor, valid: Tensor | None, query_valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return each sample's mean divergence and whether any row counts, both ``(batch,)``."""
    rows = real_rows(first, valid, query_valid)
    (p, p_counts), (q, q_counts) = _shares(first, valid, rows), _shares(second, valid, rows)
    keys = None if valid is None else valid[:, None, None, :]
    cost, *_ = _Divergence.apply(p, q, keys)  # type: ignore[no-untyped-call]
    return layer_mean(cost, p_counts & q_counts)


def _shares(layer: Tensor, valid: Tensor | None, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the rows with sum one over real keys, and which real ones attend to anything."""
    weights = widened(layer)
    total = weights.sum(dim=-1) if valid is None else key_sums(weights, valid.to(weights.dtype))[0]
    return weights / total.clamp(min=FLOOR).unsqueeze(-1), counted_rows(total, rows)


def _slopes(p: Tensor, q: Tensor, keys: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the derivatives of the divergence, which are also the factors of its sums; zero where both are zero."""
    middle = _log((p + q).mul_(0.5))
    first, second = (_log(x).sub_(middle).mul_(1 / (2 * math.log(2))) for x in (p, q))
    return (first, second) if keys is None else (first.mul_(keys), second.mul_(keys))


def _log(shares: Tensor) -> Tensor:
    return shares.clamp_min(torch.finfo(shares.dtype).tiny).log_()


class _Divergence(Function):
    """Divergence of each row, and what its gradient is made of; autograd would keep ten copies of the weights."""

    generate_vmap_rule = True

    @staticmethod
    def forward(p: Tensor, q: Tensor, keys: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        by_p, by_q = _slopes(p, q, keys)
        return torch.linalg.vecdot(p, by_p) + torch.linalg.vecdot(q, by_q), by_p, by_q

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs, *output[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *_: object) -> tuple[Tensor | None, Tensor | None, None]:
        p, q, keys, by_p, by_q = ctx.saved_tensors
        if gradient is None:
            return None, None, None
        if torch.is_grad_enabled():  # the gradient is to be differentiated itself
            by_p, by_q = _slopes(p, q, keys)
        row = gradient.unsqueeze(-1)
        return row * by_p if ctx.needs_input_grad[0] else None, row * by_q if ctx.needs_input_grad[1] else None, None
