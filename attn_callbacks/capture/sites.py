"""The call sites: every way PyTorch code reaches attention, turned into one kind of record."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attn_callbacks.capture import native
from attn_callbacks.capture.call import AttentionCall
from attn_callbacks.capture.eager import SOFTMAXES, SoftmaxWatch, four_axes
from attn_callbacks.capture.scope import ModuleScope

__all__ = ["AttentionSites"]

_SDPA = F.scaled_dot_product_attention
_MULTI_HEAD = F.multi_head_attention_forward
_NATIVE_FIRST = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)


class AttentionSites(TorchFunctionMode):
    """While active, pass every attention call of this thread to ``emit`` and compute exactly what was asked for.

    Args:
        scope: Knows the executing module.
        emit: Receives each call, not yet named.
    """

    def __init__(self, scope: ModuleScope, emit: Callable[[AttentionCall], None]) -> None:
        super().__init__()
        self._scope = scope
        self._emit_call = emit
        self._softmax = SoftmaxWatch(self._emit)
        self._padded_length: int | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _SDPA:
            return self._attend(_SDPA, *args, **kwargs)
        if func is _MULTI_HEAD:
            with self._inside_multi_head(*args, **kwargs):
                return func(*args, **kwargs)
        if func in native.KERNELS:
            self._emit(native.KERNELS[func](self._padded_length, *args, **kwargs))
        elif func is torch._nested_tensor_from_mask:
            self._padded_length = args[0].shape[1]
        elif getattr(func, "__name__", "") == "flex_attention" and len(args) > 2:
            self._flex(*args, **kwargs)
        output = func(*args, **kwargs)
        if func in SOFTMAXES:
            self._softmax.made(output, *args, **kwargs)
        elif self._softmax.pending:
            self._softmax.used(func, args, kwargs, output, self._scope.module)
        return output

    def forget(self, weights: Tensor) -> None:
        """Do not report ``weights`` as a softmax of the model's own: the model reports it itself."""
        self._softmax.forget(weights)

    @contextmanager
    def native_path_open(self) -> Iterator[None]:
        """Let ``nn.TransformerEncoder`` keep its native path, which it leaves when it sees any mode active.

        Its kernels then arrive here as calls like all others, and the model's output stays what it would have been.
        """
        original = torch.overrides.has_torch_function

        def has_torch_function(tensors: Any) -> bool:
            if self._scope.watches_this_thread() and isinstance(self._scope.module, _NATIVE_FIRST):
                return any(isinstance(t, Tensor) and type(t) not in (Tensor, nn.Parameter) for t in tensors)
            return original(tensors)

        torch.overrides.has_torch_function = has_torch_function
        try:
            yield
        finally:
            torch.overrides.has_torch_function = original

    def _emit(self, call: AttentionCall) -> None:
        # inside backward, activation checkpointing runs the forward a second time: the first was counted
        if torch._C._current_graph_task_id() == -1:
            self._emit_call(call if torch.is_grad_enabled() else _detached(call))

    def _attend(
        self,
        kernel: Callable[..., Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        is_cross: bool = False,
        **options: Any,
    ) -> Tensor:
        output = kernel(query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, **options)
        if not query.is_nested:
            self._emit(
                AttentionCall(
                    name="",
                    is_cross=is_cross,
                    query=four_axes(query),
                    key=four_axes(key),
                    value=four_axes(value),
                    mask=_mask(attn_mask, query),
                    is_causal=is_causal,
                    scale=options.get("scale"),
                    enable_gqa=options.get("enable_gqa", False),
                )
            )
        return output

    @contextmanager
    def _inside_multi_head(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # a mode is off inside its own handler: there, the functions are seen by their names
        named = {**dict(zip(("query", "key", "value", "embed_dim_to_check", "num_heads"), args, strict=False)), **kwargs}
        is_cross, heads = named["query"] is not named["key"], named["num_heads"]
        sdpa, softmax = F.scaled_dot_product_attention, F.softmax

        def attend(*args: Any, **kwargs: Any) -> Tensor:
            if not self._scope.watches_this_thread():
                return sdpa(*args, **kwargs)
            return self._attend(sdpa, *args, is_cross=is_cross, **kwargs)

        def watched_softmax(scores: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self._scope.watches_this_thread():
                by_head = scores.view(-1, heads, *scores.shape[-2:])
                self._emit(AttentionCall(name="", is_cross=is_cross, scores=by_head))
            return softmax(scores, *args, **kwargs)

        F.scaled_dot_product_attention, F.softmax = attend, watched_softmax  # type: ignore[assignment]
        try:
            yield
        finally:
            F.scaled_dot_product_attention, F.softmax = sdpa, softmax

    def _flex(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        score_mod: Any = None,
        block_mask: Any = None,
        scale: float | None = None,
        *_: Any,
        **__: Any,
    ) -> None:
        # the higher-order operator receives a mask's parts, its function last; the public function the mask itself
        mask_mod = block_mask[-1] if isinstance(block_mask, tuple) else getattr(block_mask, "mask_mod", None)
        call = AttentionCall(
            name="",
            query=query,
            key=key,
            value=value,
            scale=scale,
            enable_gqa=key.shape[1] != query.shape[1],
            score_mod=score_mod,
            mask_mod=mask_mod,
        )
        self._emit(call)


def _mask(mask: Tensor | None, query: Tensor) -> Tensor | None:
    if mask is None:
        return None
    if type(mask).__name__ == "CausalBias":  # a subclass that stands for a triangle it never builds
        rows, columns = mask.seq_len_q, mask.seq_len_kv  # type: ignore[attr-defined]
        lower_right = mask.variant.name == "LOWER_RIGHT"  # type: ignore[attr-defined]
        triangle = torch.ones(rows, columns, dtype=torch.bool, device=query.device)
        return triangle.tril(columns - rows if lower_right else 0)[None, None]
    if mask.ndim < 4:
        return mask.view(*(1,) * (4 - mask.ndim), *mask.shape) if query.ndim != 3 or mask.ndim < 3 else mask[:, None]
    return mask if mask.ndim == 4 else mask.expand(*query.shape[:-3], *mask.shape[-3:]).flatten(0, -4)


def _detached(call: AttentionCall) -> AttentionCall:
    tensors = {f.name: getattr(call, f.name) for f in fields(call) if isinstance(getattr(call, f.name), Tensor)}
    return replace(call, **{name: tensor.detach() for name, tensor in tensors.items()})
