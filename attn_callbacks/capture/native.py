"""The native kernels of ``nn.TransformerEncoder`` and ``nn.MultiheadAttention`` in eval mode, read from outside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_callbacks.capture.call import AttentionCall

__all__ = ["KERNELS"]


def _multi_head(_padded: int | None, query: Tensor, _key: Tensor, _value: Tensor, *rest: Any) -> AttentionCall:
    _, heads, weight, bias, _, _, mask, _, _, mask_type = rest
    return _project("", query, heads, weight, bias, mask, mask_type)


def _encoder_layer(padded: int | None, source: Tensor, *rest: Any) -> AttentionCall:
    _, heads, weight, bias, _, _, _, norm_first, eps, norm_weight, norm_bias, *_, mask, mask_type = rest
    # the layer's kernel replaces the call of its attention module: it gets that module's name
    lengths = None
    if source.is_nested:
        lengths = torch.tensor([len(sample) for sample in source.unbind()], device=source.device)
        size = None if padded is None else (source.size(0), padded, weight.shape[1])
        source = torch.nested.to_padded_tensor(source, 0.0, size)
    if norm_first:
        source = F.layer_norm(source, source.shape[-1:], norm_weight, norm_bias, eps)
    if lengths is not None:
        allowed = torch.arange(source.shape[1], device=source.device) < lengths[:, None]
        return _project("self_attn", source, heads, weight, bias, ~allowed, 1)
    return _project("self_attn", source, heads, weight, bias, mask, mask_type)


def _project(
    name: str, source: Tensor, heads: int, weight: Tensor, bias: Tensor, mask: Tensor | None, mask_type: int | None
) -> AttentionCall:
    width = weight.shape[1]
    query, key = F.linear(source, weight[: 2 * width], bias[: 2 * width]).chunk(2, dim=-1)
    query, key = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key))
    return AttentionCall(name=name, query=query, key=key, mask=_mask(mask, mask_type))


def _mask(mask: Tensor | None, mask_type: int | None) -> Tensor | None:
    """Give the kernel's mask (``True`` = ignored) the axes and the meaning of an ``AttentionCall``."""
    if mask is None:
        return None
    allowed = ~mask if mask.dtype == torch.bool else mask
    if mask_type == 1:  # (batch, keys)
        return allowed[:, None, None, :]
    return allowed[None, None] if mask_type == 0 else allowed


KERNELS: dict[Any, Callable[..., AttentionCall]] = {
    torch._native_multi_head_attention: _multi_head,
    torch._transformer_encoder_layer_fwd: _encoder_layer,
}
