"""Suppress attention to a forbidden set: a cost for every row that attends to it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from losses._checks import REDUCTIONS, in_range, one_of
from losses.attention._layers import as_layers, layer_mean, reduce_layers, widened
from losses.attention._mass import Degrees, degrees, mass, surprise
from losses.attention._rows import check_query_valid, check_valid, counted_rows

__all__ = ["AttentionSuppressionLoss", "attention_suppression"]


def attention_suppression(
    weights: Tensor | Sequence[Tensor],
    target_mask: Tensor,
    valid: Tensor | None = None,
    *,
    threshold: float = 0.0,
    query_valid: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Penalise the attention mass on a forbidden set, in all layers.

    With :math:`m = \sum_j s_j a_j / \sum_j a_j` the share of a row's weights on valid keys that falls on the set,

    .. math::
        \ell = \max\left(0, \; -\log(1 - m) + \log(1 - \tau)\right)

    in nats: nothing up to the threshold :math:`\tau`, then steeper the more of a row falls on the set; bounded at
    :math:`m = 1`, with a gradient. Costs are averaged over a sample's rows and heads, then over layers, then over the
    samples that have such a set. One pass over the weights.

    Give it every layer: if no query outside the set attends to the set in any layer, then no other token's state
    depends on it; in one layer it is a wish, since information flows around it. For the same reason, in self-attention
    a query counts by its degree of being outside: what a forbidden token attends to harms nobody. In cross-attention
    every real query counts.

    Attention mass is not reliance. Pruthi et al. add this very penalty, :math:`-\log(1 - m)` on impermissible tokens,
    to make a model *look* unbiased in its attention while it still relies on those tokens. As long as the cost is above
    zero in any layer, it proves nothing: mask the tokens and measure the drop.

    Samples without a forbidden valid key, or with nothing but forbidden ones, contribute nothing and leave the average,
    as do rows without weight on valid keys.

    Args:
        weights: Attention weights after the softmax, of one layer or, better, of all.
        target_mask: Degree to which each key is forbidden, boolean or in ``[0, 1]``.
        valid: ``True`` for real tokens, ``False`` for padding; ``None`` takes every key. Where ``queries == keys`` and
            no ``query_valid`` is given, it also leaves out the rows of padding.
        threshold: Mass on the set that is tolerated, from 0 to below 1.
        query_valid: ``True`` for the real tokens among the queries of cross-attention. ``None`` takes a layer with
            ``queries == keys`` for self-attention, whose queries are the tokens that keys are, and every other for
            cross-attention between real queries: pass it wherever cross-attention may have as many queries as keys.
        reduction: ``"mean"`` over samples with a forbidden set, ``"sum"`` or ``"none"``.

    Shape:
        - weights: ``(batch, heads, queries, keys)``; heads and queries may differ between layers
        - target_mask, valid: ``(batch, keys)``
        - query_valid: ``(batch, queries)``
        - output: scalar, or ``(batch,)`` for ``reduction="none"``; in nats

    Raises:
        ValueError: If there are no weights, a shape does not fit, an argument is out of its range or (checked on the
            CPU only) a mask has values outside ``[0, 1]`` or the weights are not those after a softmax.
        TypeError: If ``weights`` holds something else than floating tensors.

    Example:
        >>> scores = torch.zeros(1, 1, 2, 2, requires_grad=True)
        >>> loss = attention_suppression(scores.softmax(dim=-1), torch.tensor([[False, True]]))
        >>> loss.backward()
        >>> loss
        tensor(0.6931, grad_fn=<DivBackward0>)
        >>> scores.grad[0, 0]
        tensor([[-0.5000,  0.5000],
                [ 0.0000,  0.0000]])

    References:
        Pruthi et al., "Learning to Deceive with Attention-Based Explanations", ACL 2020 (the penalty, used to deceive).
        Chefer et al., "Optimizing Relevance Maps of Vision Transformers Improves Robustness", NeurIPS 2022 (suppress
        the background of a relevance map, by a squared error).
    """
    _check_threshold(threshold)
    one_of("reduction", reduction, REDUCTIONS)
    layers = as_layers(weights)
    valid, query_valid = check_valid(valid, layers[0]), check_query_valid(query_valid, layers)
    forbidden = degrees("target_mask", target_mask, valid, layers[0])
    inside = forbidden.member.sum(dim=1)
    present = (inside > 0) & (inside < forbidden.real.sum(dim=1))
    with torch.autocast(layers[0].device.type, enabled=False):
        costs = [_layer_cost(layer, forbidden, query_valid, threshold) for layer in layers]
        return reduce_layers(costs, present, reduction)


class AttentionSuppressionLoss(nn.Module):
    """Penalise attention to a forbidden set, in all layers; see :func:`attention_suppression`.

    Args:
        threshold: Mass on the set that is tolerated, from 0 to below 1.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Shape:
        - forward: as :func:`attention_suppression`

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> suppression = AttentionSuppressionLoss(threshold=0.1)
        >>> scores = torch.zeros(1, 2, 4, 4, requires_grad=True)
        >>> loss = suppression([scores.softmax(dim=-1)], torch.tensor([[1, 0, 0, 0]]))
        >>> loss.backward()
        >>> loss
        tensor(0.1823, grad_fn=<DivBackward0>)
    """

    def __init__(self, threshold: float = 0.0, reduction: str = "mean") -> None:
        super().__init__()
        self.threshold = _check_threshold(threshold)
        self.reduction = one_of("reduction", reduction, REDUCTIONS)

    def forward(
        self,
        weights: Tensor | Sequence[Tensor],
        target_mask: Tensor,
        valid: Tensor | None = None,
        *,
        query_valid: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of the attention ``weights``."""
        return attention_suppression(
            weights,
            target_mask,
            valid,
            threshold=self.threshold,
            query_valid=query_valid,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """Show how to build the loss again."""
        return f"threshold={self.threshold}, reduction={self.reduction!r}"


def _check_threshold(threshold: float) -> float:
    if in_range("threshold", threshold, 0, 1) == 1:
        raise ValueError("`threshold` must be below 1, got 1: every row would be tolerated.")
    return threshold


def _layer_cost(
    layer: Tensor, forbidden: Degrees, query_valid: Tensor | None, threshold: float
) -> tuple[Tensor, Tensor]:
    """Return each sample's mean cost ``(batch,)``, and whether it has any row ``(batch,)``."""
    outside = forbidden.real - forbidden.member
    (clean,), total = mass(widened(layer), forbidden.real, outside)
    cost = (surprise(clean) - surprise(clean.new_tensor(1 - threshold))).relu()
    if query_valid is not None:
        return layer_mean(cost, counted_rows(total, query_valid[:, None], clean))
    if layer.shape[2] != layer.shape[3]:
        return layer_mean(cost, counted_rows(total, None, clean))
    queries = outside[:, None]  # they are the tokens that keys are; padding is not outside
    return layer_mean(cost, counted_rows(total, queries > 0, clean), queries)
