"""The native kernels of ``nn.TransformerEncoder`` and ``nn.MultiheadAttention`` in eval mode, read from outside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_callbacks.capture.call import AttentionCall

__all__ = ["KERNELS"]


def _multi_head(padded: int | None, query: Tensor, _key: Tensor, _value: Tensor, *rest: Any) -> AttentionCall:
    _, heads, weight, bias, _, _, mask, _, _, mask_type = rest  # the kernel is for one sequence: key is query
    return _attend("", padded, query, heads, weight, bias, mask, mask_type)


def _encoder_layer(padded: int | None, source: Tensor, *rest: Any) -> AttentionCall:
    _, heads, weight, bias, _, _, _, norm_first, eps, norm_weight, norm_bias, *_, mask, mask_type = rest
    if norm_first:
        source = F.layer_norm(source, source.shape[-1:], norm_weight, norm_bias, eps)
    # the layer's kernel replaces the call of its attention module: it gets that module's name
    return _attend("self_attn", padded, source, heads, weight, bias, mask, mask_type)


def _attend(
    name: str,
    padded: int | None,
    source: Tensor,
    heads: int,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    mask_type: int | None,
) -> AttentionCall:
    """Project as the kernel does; ``weight`` and ``bias`` hold queries, keys and values one after the other."""
    if source.is_nested:
        source, mask, mask_type = *_padded(source, padded), 1
    width = weight.shape[1]
    projected = F.linear(source, weight[: 2 * width], bias[: 2 * width])
    query, key = projected.view(*source.shape[:2], 2, heads, -1).permute(2, 0, 3, 1, 4)
    return AttentionCall(name=name, query=query, key=key, mask=_mask(mask, mask_type))


def _padded(source: Tensor, padded: int | None) -> tuple[Tensor, Tensor]:
    """Make a nested ``(batch, *, width)`` tensor regular, with its mask: ``True`` = ignored."""
    lengths = torch.tensor([len(sample) for sample in source.unbind()], device=source.device)
    longest = max(int(lengths.max()), padded or 0)
    regular = torch.nested.to_padded_tensor(source, 0.0, (source.size(0), longest, source.size(2)))
    return regular, torch.arange(longest, device=source.device) >= lengths[:, None]


def _mask(mask: Tensor | None, mask_type: int | None) -> Tensor | None:
    """Give the kernel's mask the axes and the meaning of an ``AttentionCall``."""
    if mask is None:
        return None
    allowed = ~mask.bool()  # whatever is not zero is ignored: the kernel takes a floating-point mask for a boolean one
    if mask_type == 1:  # (batch, keys)
        return allowed[:, None, None, :]
    return allowed[None, None] if allowed.ndim == 2 else allowed


KERNELS: dict[Any, Callable[..., AttentionCall]] = {
    torch._native_multi_head_attention: _multi_head,
    torch._transformer_encoder_layer_fwd: _encoder_layer,
}
"""Reads each kernel's arguments, after the length to which nested tensors will be padded (``None``: the longest)."""
