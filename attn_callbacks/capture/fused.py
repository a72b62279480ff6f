"""Read the arguments of fused kernels: ``scaled_dot_product_attention`` and FlexAttention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attn_callbacks.capture.call import AttentionCall

__all__ = ["flex_call", "four_axes", "sdpa_call"]


def sdpa_call(
    output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionCall | None:
    """Read a call of ``scaled_dot_product_attention`` that returned ``output``.

    ``None`` for nested tensors, whose lengths are not in the call.
    """
    if query.is_nested:
        return None
    return AttentionCall(
        name="",
        query=four_axes(query),
        key=four_axes(key),
        value=four_axes(value),
        output=output,
        mask=None if attn_mask is None else _mask(attn_mask, query),
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )


def flex_call(
    output: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Any = None,
    block_mask: Any = None,
    scale: float | None = None,
    *_: Any,
    **__: Any,
) -> AttentionCall:
    """Read a call of FlexAttention's operator.

    The operator gets a block mask in its parts, the function last, and returns the log-sum-exp behind its output.
    """
    return AttentionCall(
        name="",
        query=query,
        key=key,
        value=value,
        output=output[0] if isinstance(output, tuple) else output,
        scale=scale,
        enable_gqa=key.shape[1] != query.shape[1],
        score_mod=score_mod,
        mask_mod=block_mask[-1] if isinstance(block_mask, tuple) else getattr(block_mask, "mask_mod", None),
    )


def four_axes(tensor: Tensor) -> Tensor:
    """View ``(..., heads, queries, n)`` as ``(batch, heads, queries, n)``; three axes are a batch of one head."""
    if tensor.ndim == 3:
        return tensor[:, None]
    return tensor if tensor.ndim == 4 else tensor.flatten(0, -4)


def _mask(mask: Tensor, query: Tensor) -> Tensor:
    if type(mask).__name__ == "CausalBias":  # a subclass that stands for a triangle it never builds
        mask = _triangle(mask, query.device)
    mask = mask.reshape((1,) * (query.ndim - mask.ndim) + mask.shape)  # broadcasting aligns at the last axis
    if query.ndim > 4:
        mask = mask.expand(*query.shape[:-3], *mask.shape[-3:])
    return four_axes(mask)


def _triangle(bias: Any, device: torch.device) -> Tensor:
    rows, columns = bias.seq_len_q, bias.seq_len_kv
    lowest = columns - rows if bias.variant.name == "LOWER_RIGHT" else 0
    return torch.ones(rows, columns, dtype=torch.bool, device=device).tril(lowest)
