"""What attention says about the importance of its keys: mass, mass times gradient, mass times length of the values."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_callbacks._checks import check_axes
from attn_callbacks.functional._precision import wide
from attn_callbacks.functional.value_norms import layer_value_norms

__all__ = ["attention_gradient_mass", "received_attention", "top_features", "value_weighted_attention"]


def received_attention(weights: Tensor, *, valid: Tensor | None = None, query: int | None = None) -> Tensor:
    r"""Average the attention that every key receives.

    .. math:: c_j = \operatorname{mean}_{h, i} A_h[i, j]

    Says where heads look, not what they make of it: compare it with a check that masks the key.

    Args:
        weights: Attention weights.
        valid: ``True`` for the queries that are tokens; ``None``: all.
        query: The only query that counts, such as 0 for a class token; ``None``: the mean over all.

    Shape:
        - weights: ``(batch, heads, queries, keys)``
        - valid: ``(batch, queries)``
        - output: ``(batch, keys)``, float32 or wider; zero for a sample without a valid query

    Raises:
        ValueError: If a shape does not fit or there is no such query.

    Example:
        >>> received_attention(torch.tensor([[[[1.0, 0.0], [0.25, 0.75]]]]))
        tensor([[0.6250, 0.3750]])
    """
    check_axes("weights", weights, 4)
    return _over_queries(wide(weights).mean(dim=1), valid, query, mean=True)


def attention_gradient_mass(
    weights: Tensor, gradients: Tensor, *, valid: Tensor | None = None, query: int | None = None
) -> Tensor:
    r"""Add up attention times its gradient over the heads and queries that look at a key.

    .. math:: s_j = \sum_{h, i} A_h[i, j] \, \partial y / \partial A_h[i, j]

    To first order this is by how much the output falls when nobody attends to the key in this layer. Its sign counts:
    below zero a key speaks against the output. Add up layers.

    Args:
        weights: Attention weights.
        gradients: Gradient of the output with respect to them
            (:func:`attn_callbacks.analysis.attention_gradient.attention_gradients`).
        valid: As in `received_attention`.
        query: As in `received_attention`.

    Shape:
        - weights, gradients: ``(batch, heads, queries, keys)``
        - valid: ``(batch, queries)``
        - output: ``(batch, keys)``, float32 or wider

    Raises:
        ValueError: If a shape does not fit or there is no such query.

    Example:
        >>> weights, gradients = torch.tensor([[[[0.5, 0.5]]]]), torch.tensor([[[[2.0, -1.0]]]])
        >>> attention_gradient_mass(weights, gradients)
        tensor([[ 1.0000, -0.5000]])
    """
    check_axes("weights", weights, 4)
    if gradients.shape != weights.shape:
        raise ValueError(
            f"`gradients` must have the shape of `weights`, {tuple(weights.shape)}, got {tuple(gradients.shape)}."
        )
    product = wide(weights) * wide(gradients)
    return _over_queries(product.sum(dim=1), valid, query, mean=False)


def value_weighted_attention(
    weights: Tensor,
    value: Tensor,
    projection: Tensor | None = None,
    *,
    valid: Tensor | None = None,
    query: int | None = None,
) -> Tensor:
    """Average the length of the vector that every key hands on, all heads of a layer together.

    A key on which heads rest though its value is short, such as a separator, loses its place.

    Args:
        weights: Attention weights.
        value: As in `value_norm_weights`.
        projection: As in `value_norm_weights`.
        valid: As in `received_attention`.
        query: As in `received_attention`.

    Shape:
        - weights: ``(batch, heads, queries, keys)``
        - value: ``(batch, value_heads, keys, head_dim)``
        - projection: ``(width, heads * head_dim)``
        - valid: ``(batch, queries)``
        - output: ``(batch, keys)``, float32 or wider

    Raises:
        ValueError: If a shape does not fit or there is no such query.

    Example:
        >>> weights, value = torch.full((1, 1, 1, 2), 0.5), torch.tensor([[[[3.0, 4.0], [0.0, 0.0]]]])
        >>> value_weighted_attention(weights, value)
        tensor([[2.5000, 0.0000]])

    References:
        Kobayashi et al., "Attention is Not Only a Weight: Analyzing Transformers with Vector Norms", 2020.
    """
    return _over_queries(layer_value_norms(weights, value, projection), valid, query, mean=True)


def top_features(scores: Tensor, share: float, features: Tensor | None = None) -> Tensor:
    """Mark the highest share of every sample's features, rounded up; equal scores in reading order.

    Args:
        scores: One a feature; NaN ranks last.
        share: Above 0, up to 1.
        features: ``True`` for the places that are features; ``None``: all.

    Shape:
        - scores, features: ``(batch, places)``
        - output: ``(batch, places)``, bool

    Raises:
        ValueError: If a shape does not fit or ``share`` lies outside.

    Example:
        >>> top_features(torch.tensor([[0.1, 0.9, 0.5, 0.3]]), 0.3)
        tensor([[False,  True,  True, False]])
    """
    check_axes("scores", scores, 2)
    if not 0 < share <= 1:
        raise ValueError(f"`share` must be above 0 and at most 1, got {share}.")
    features = torch.ones_like(scores, dtype=torch.bool) if features is None else features.bool()
    if features.shape != scores.shape:
        raise ValueError(f"`features` must have shape {tuple(scores.shape)}, got {tuple(features.shape)}.")
    scores = scores if scores.is_floating_point() else scores.double()
    known = scores.nan_to_num(-torch.finfo(scores.dtype).max).where(features, -torch.inf)
    rank = known.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    wanted = (features.sum(dim=1, keepdim=True) * share - 1e-6).ceil()  # 10 features x 0.1 is one, and not two
    return (rank < wanted) & features


def _over_queries(maps: Tensor, valid: Tensor | None, query: int | None, *, mean: bool) -> Tensor:
    """Add up or average ``(batch, queries, keys)`` over the queries that count."""
    batch, queries, _ = maps.shape
    if query is not None:
        if not -queries <= query < queries:
            raise ValueError(f"`query` must lie between {-queries} and {queries - 1}, got {query}.")
        return maps[:, query]
    if valid is None:
        return maps.mean(dim=1) if mean else maps.sum(dim=1)
    if tuple(valid.shape) != (batch, queries):
        raise ValueError(f"`valid` must have shape (batch, queries) = {(batch, queries)}, got {tuple(valid.shape)}.")
    counted = valid.to(maps.device, torch.bool)
    total = maps.where(counted[..., None], 0.0).sum(dim=1)
    return total / counted.sum(dim=1, keepdim=True).clamp_min(1) if mean else total
