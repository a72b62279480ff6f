"""Attention weighted with the size of what it carries: a large weight on a small vector moves nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_callbacks._checks import check_axes
from attn_callbacks.functional._precision import full_precision

__all__ = ["layer_value_norms", "value_norm_weights"]


def value_norm_weights(weights: Tensor, value: Tensor, projection: Tensor | None = None) -> Tensor:
    r"""Measure the length of the vector that every key contributes to every query, head by head.

    .. math:: N_h[i, j] = A_h[i, j] \lVert f_h(x_j) \rVert, \qquad f_h(x) = (x W_V + b_V)_h W_{O,h}

    Rows do not sum to one. Keys that heads rest on, such as separators, often have short values and lose their place.
    Without the output projection it is the length of :math:`A v`, which does not tell what the projection makes of it.
    Costs the projection of every value, ``heads * keys * width`` numbers, and one pass over the maps.

    Args:
        weights: Attention weights.
        value: Values as attention mixes them, with the bias of their projection. Fewer heads than ``weights`` are
            shared (grouped queries): query head ``h`` reads value head ``h // (heads / value_heads)``.
        projection: Weight of the output projection as ``nn.Linear`` holds it; ``None`` leaves it out. Every query head
            has its own slice of columns, also where values are shared. Its bias belongs to no key.

    Shape:
        - weights: ``(batch, heads, queries, keys)``
        - value: ``(batch, value_heads, keys, head_dim)``
        - projection: ``(width, heads * head_dim)``
        - output: ``(batch, heads, queries, keys)``, float32 or wider

    Raises:
        ValueError: If a shape does not fit.

    Example:
        >>> weights, value = torch.full((1, 1, 1, 2), 0.5), torch.tensor([[[[3.0, 4.0], [0.0, 0.0]]]])
        >>> value_norm_weights(weights, value)
        tensor([[[[2.5000, 0.0000]]]])

    References:
        Kobayashi et al., "Attention is Not Only a Weight: Analyzing Transformers with Vector Norms", 2020, section 2.
    """
    with full_precision(weights.device):
        contents = _contents(weights, value, projection)
        return weights.detach().to(contents.dtype) * _lengths(contents)


def layer_value_norms(weights: Tensor, value: Tensor, projection: Tensor | None = None) -> Tensor:
    r"""Measure the length of the vector that every key contributes to every query, all heads of a layer together.

    .. math:: N[i, j] = \Bigl\lVert \sum_h A_h[i, j] f_h(x_j) \Bigr\rVert

    At most the sum of `value_norm_weights` over heads, less where heads cancel. Without a projection heads write to
    channels of their own and cannot cancel. Costs ``queries * keys * heads ** 2`` products and a small QR decomposition
    a key; nothing of size ``queries * keys * width`` is built.

    Args:
        weights: Attention weights.
        value: As in `value_norm_weights`.
        projection: As in `value_norm_weights`.

    Shape:
        - weights: ``(batch, heads, queries, keys)``
        - value: ``(batch, value_heads, keys, head_dim)``
        - projection: ``(width, heads * head_dim)``
        - output: ``(batch, queries, keys)``, float32 or wider

    Raises:
        ValueError: If a shape does not fit.

    Example:
        >>> weights, value = torch.full((1, 2, 1, 1), 1.0), torch.tensor([[[[1.0]], [[-1.0]]]])
        >>> layer_value_norms(weights, value), layer_value_norms(weights, value, torch.ones(1, 2))  # heads cancel
        (tensor([[[1.4142]]]), tensor([[[0.]]]))

    References:
        Kobayashi et al., 2020, section 2.
    """
    with full_precision(weights.device):
        contents = _contents(weights, value, projection)
        maps = weights.detach().to(contents.dtype)
        if projection is None:
            return (maps * _lengths(contents)).square().sum(dim=1).sqrt()
        # of every key, a triangle that keeps the lengths of all sums of its heads' vectors: (batch, keys, heads, heads)
        triangle = torch.linalg.qr(contents.permute(0, 2, 3, 1), mode="r").R
        sums = triangle @ maps.permute(0, 3, 1, 2)  # (batch, keys, heads, queries)
        lengths: Tensor = torch.linalg.vector_norm(sums, dim=2)
        return lengths.mT


def _lengths(contents: Tensor) -> Tensor:
    """Return the length of what each key holds, ``(batch, heads, 1, keys)``."""
    lengths: Tensor = torch.linalg.vector_norm(contents, dim=-1)
    return lengths[:, :, None]


def _contents(weights: Tensor, value: Tensor, projection: Tensor | None) -> Tensor:
    """Return what every head makes of every key, ``(batch, heads, keys, width or head_dim)``."""
    check_axes("weights", weights, 4)
    check_axes("value", value, 4)
    batch, heads, _, keys = weights.shape
    groups, width = value.shape[1], value.shape[3]
    if value.shape[0] != batch or value.shape[2] != keys or not groups or heads % groups:
        raise ValueError(
            f"`value` must have shape (batch, value_heads, keys, head_dim) with {batch} samples, {keys} keys and a "
            f"number of heads that divides {heads}, got {tuple(value.shape)}."
        )
    dtype = torch.promote_types(torch.promote_types(weights.dtype, value.dtype), torch.float32)
    own = value.detach().to(dtype).repeat_interleave(heads // groups, dim=1)
    if projection is None:
        return own
    if projection.ndim != 2 or projection.shape[1] != heads * width:
        raise ValueError(
            f"`projection` must have shape (width, heads * head_dim) = (..., {heads * width}), got "
            f"{tuple(projection.shape)}. Pass the weight of an `nn.Linear`, or the transpose of another layout."
        )
    slices = projection.detach().to(own).unflatten(1, (heads, width)).permute(1, 2, 0)  # (heads, head_dim, width)
    return torch.matmul(own, slices)
