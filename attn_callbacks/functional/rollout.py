"""Attention rollout: where the information of a token came from, over all layers and past the residual connections."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attn_callbacks._checks import in_range
from attn_callbacks.functional._mixing import (
    checked_maps,
    masked,
    positive_means,
    positive_weights,
    residual_mix,
    target_rows,
)
from attn_callbacks.functional._precision import full_precision

__all__ = ["attention_rollout", "gradient_rollout", "gradient_weights"]


def attention_rollout(
    weights: Sequence[Tensor],
    *,
    valid: Tensor | None = None,
    residual: float = 0.5,
    targets: Tensor | Sequence[int] | None = None,
) -> Tensor:
    r"""Follow attention from the last layer down to the inputs, as if tokens were mixed by it alone.

    .. math:: \bar A_l = (1 - \rho) \operatorname{mean}_h A_l + \rho I, \qquad R = \bar A_L \cdots \bar A_1

    with the rows of every :math:`\bar A_l` scaled to one. It needs no gradient and no class, so it says where a token's
    information may come from, not what of it decides. Costs one mean over heads and one matrix product a layer; a few
    ``targets`` cost one product of these rows with a matrix instead.

    Args:
        weights: Attention of every layer, first layer first. Heads may differ in number between layers.
        valid: ``True`` for tokens, ``False`` for padding, which then neither gives nor receives; ``None``: all.
        residual: Share of the residual connection. One half counts it as much as attention; 0 leaves it out.
        targets: Queries whose rows are wanted; ``None``: all.

    Shape:
        - weights: ``(batch, heads, tokens, tokens)`` a layer
        - valid: ``(batch, tokens)``
        - targets: ``(targets,)``, or ``(batch, targets)`` for other ones in every sample
        - output: ``(batch, tokens, tokens)`` or ``(batch, targets, tokens)``, float32 or wider. Rows sum to one, those
          of padding are zero

    Raises:
        ValueError: If maps are not square or layers have other samples or tokens, if ``residual`` is outside [0, 1], or
            a shape does not fit.
        TypeError: If ``weights`` is one tensor.

    Example:
        >>> layer = torch.tensor([[[[1.0, 0.0], [0.25, 0.75]]]])
        >>> attention_rollout([layer, layer])
        tensor([[[1.0000, 0.0000],
                 [0.2344, 0.7656]]])

    References:
        Abnar and Zuidema, "Quantifying Attention Flow in Transformers", 2020, section 3.
    """
    batch, tokens = checked_maps(weights, valid)
    in_range("residual", residual, 0.0, 1.0)
    rows = None if targets is None else target_rows(targets, batch, tokens, weights[0].device)
    with full_precision(weights[0].device):
        rolled = _rolled(weights, valid, residual, rows)
    if rows is None:
        return masked(rolled, valid)
    if valid is None:
        return rolled
    valid = valid.to(rolled.device, torch.bool)
    return rolled.where(valid.gather(1, rows)[..., None] & valid[:, None], 0.0)


def gradient_rollout(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    *,
    valid: Tensor | None = None,
    residual: float = 0.5,
    targets: Tensor | Sequence[int] | None = None,
) -> Tensor:
    r"""Roll out attention weighted with its gradient: only what speaks for one class is followed.

    `attention_rollout` of :math:`(A \odot \partial y / \partial A)^+`, negative parts cut head by head before the mean
    over heads. Rows are scaled to one together with the residual connection, so where gradients are small a token keeps
    to itself: compare the tokens of one row, not the rows of two networks. `attention_relevance` does the same without
    that scaling.

    Args:
        weights: Attention of every layer, first layer first.
        gradients: Gradient of the class' logit with respect to each layer's weights, in the same order.
        valid: As in `attention_rollout`.
        residual: As in `attention_rollout`.
        targets: As in `attention_rollout`.

    Shape:
        - weights, gradients: ``(batch, heads, tokens, tokens)`` a layer
        - output: as that of `attention_rollout`

    Raises:
        ValueError: As `attention_rollout`, and if a gradient has another shape than its weights.
        TypeError: If ``weights`` or ``gradients`` is one tensor.

    Example:
        >>> layer, gradient = torch.tensor([[[[0.5, 0.5], [0.25, 0.75]]]]), torch.tensor([[[[1.0, -1.0], [2.0, 0.0]]]])
        >>> gradient_rollout([layer], [gradient])
        tensor([[[1.0000, 0.0000],
                 [0.3333, 0.6667]]])

    References:
        Chefer, Gur and Wolf, "Generic Attention-model Explainability", 2021, equation 5 (the weighting); Abnar and
        Zuidema, 2020 (the rollout).
    """
    checked_maps(weights, valid)
    means = [mean[:, None] for mean in positive_means(weights, gradients)]  # as of one head
    return attention_rollout(means, valid=valid, residual=residual, targets=targets)


def gradient_weights(weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    """Weigh the attention of every head with its gradient, and keep what is positive.

    What `gradient_rollout` and `attention_relevance` follow; give it to `top_paths` to trace them.

    Args:
        weights: Attention of every layer.
        gradients: Gradient of one number with respect to each layer's weights, in the same order.

    Shape:
        - weights, gradients, output: ``(batch, heads, queries, keys)`` a layer; the output in float32 or wider

    Raises:
        ValueError: If the numbers of layers differ, or a gradient has another shape than its weights.
        TypeError: If one of the two is a single tensor.

    Example:
        >>> gradient_weights([torch.full((1, 1, 1, 2), 0.5)], [torch.tensor([[[[1.0, -1.0]]]])])
        [tensor([[[[0.5000, 0.0000]]]])]
    """
    return positive_weights(weights, gradients)


def _rolled(weights: Sequence[Tensor], valid: Tensor | None, residual: float, rows: Tensor | None) -> Tensor:
    """Multiply the layers: from below for all queries, from above for the ``rows (batch, targets)``."""
    if rows is None:
        rolled = residual_mix(weights[0], valid, residual)
        for maps in weights[1:]:
            rolled = residual_mix(maps, valid, residual) @ rolled
        return rolled
    last = residual_mix(weights[-1], valid, residual)
    rolled = last.gather(1, rows[..., None].expand(-1, -1, last.shape[-1]))
    for maps in reversed(weights[:-1]):
        rolled = rolled @ residual_mix(maps, valid, residual)
    return rolled
