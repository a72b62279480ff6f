"""Suppress attention to a forbidden set: a cost for every row that relies on it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from losses._checks import REDUCTIONS, in_range, one_of
from losses.attention._layers import EMPTY_ROW, as_layers, check_valid, layer_mean, reduce_layers
from losses.attention._mass import Degrees, degrees, mass, smallest, surprise

__all__ = ["AttentionSuppressionLoss", "attention_suppression"]


def attention_suppression(
    weights: Tensor | Sequence[Tensor],
    target_mask: Tensor,
    valid: Tensor | None = None,
    *,
    threshold: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    r"""Penalise the attention mass on a forbidden set, from all queries and in all layers.

    With :math:`m = \sum_j s_j a_j / \sum_j a_j` the share of a row's weights on valid keys that falls on the set,

    .. math::
        \ell = \max\left(0, \; -\log(1 - m) + \log(1 - \tau)\right)

    in nats: nothing up to the threshold :math:`\tau`, then steeper the more a row relies on the set; bounded at
    :math:`m = 1`, with a gradient. Costs are averaged over a sample's rows and heads, then over layers, then over the
    samples that have such a set. One pass over the weights.

    Give it every layer: if no query outside the set attends to the set in any layer, then no other token's state
    depends on it; in one layer it is a wish, since information flows around it. For the same reason, in self-attention
    (``queries == keys``) a query counts by its degree of being outside: what a forbidden token attends to harms nobody.
    Low mass is not low reliance as long as the cost is above zero: measure the drop when the set is masked, too.

    Samples without a forbidden valid key, or with nothing but forbidden ones, contribute nothing and leave the average,
    as do rows without weight on valid keys.

    Args:
        weights: Attention weights after the softmax, of one layer or, better, of all.
        target_mask: Degree to which each key is forbidden, boolean or in ``[0, 1]``.
        valid: ``True`` for real tokens, ``False`` for padding; ``None`` takes every key. Where ``queries == keys``, it
            also leaves out the rows of padding.
        threshold: Mass on the set that is tolerated, from 0 to below 1.
        reduction: ``"mean"`` over samples with a forbidden set, ``"sum"`` or ``"none"``.

    Shape:
        - weights: ``(batch, heads, queries, keys)``; heads and queries may differ between layers
        - target_mask, valid: ``(batch, keys)``
        - output: scalar, or ``(batch,)`` for ``reduction="none"``; in nats

    Raises:
        ValueError: If there are no weights, a shape does not fit, an argument is out of its range or (checked on the
            CPU only) ``target_mask`` has values outside ``[0, 1]``.
        TypeError: If ``weights`` holds something else than tensors.

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
        Chefer et al., "Optimizing Relevance Maps of Vision Transformers Improves Robustness", NeurIPS 2022 (suppress
        the background of a relevance map, by a squared error).
    """
    _check_threshold(threshold)
    one_of("reduction", reduction, REDUCTIONS)
    layers = as_layers(weights)
    valid = check_valid(valid, layers[0])
    forbidden = degrees("target_mask", target_mask, valid, layers[0])
    inside = forbidden.member.sum(dim=1)
    present = (inside > 0) & (inside < forbidden.real.sum(dim=1))
    with torch.autocast(layers[0].device.type, enabled=False):
        return reduce_layers([_layer_cost(layer, forbidden, threshold) for layer in layers], present, reduction)


class AttentionSuppressionLoss(nn.Module):
    """Penalise attention to a forbidden set, in all layers and from all queries; see :func:`attention_suppression`.

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

    def forward(self, weights: Tensor | Sequence[Tensor], target_mask: Tensor, valid: Tensor | None = None) -> Tensor:
        """Return the loss of the attention ``weights``."""
        return attention_suppression(weights, target_mask, valid, threshold=self.threshold, reduction=self.reduction)

    def extra_repr(self) -> str:
        """Show how to build the loss again."""
        return f"threshold={self.threshold}, reduction={self.reduction!r}"


def _check_threshold(threshold: float) -> float:
    if in_range("threshold", threshold, 0, 1) == 1:
        raise ValueError("`threshold` must be below 1, got 1: every row would be tolerated.")
    return threshold


def _layer_cost(layer: Tensor, forbidden: Degrees, threshold: float) -> tuple[Tensor, Tensor]:
    """Return each sample's mean cost ``(batch,)``, and whether it has any row ``(batch,)``."""
    outside = forbidden.real - forbidden.member
    (clean,), total = mass(layer, forbidden.real, outside)
    floor = smallest(layer)
    tolerated = surprise(clean.new_tensor(1 - threshold), floor)
    cost = (surprise(clean, floor) - tolerated).relu()
    square = layer.shape[2] == layer.shape[3]  # queries are the tokens that keys are; `outside` leaves out padding
    return layer_mean(cost, total > EMPTY_ROW, outside[:, None] if square else None)
