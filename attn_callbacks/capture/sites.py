"""The call sites: every way PyTorch code reaches attention, turned into one kind of record."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attn_callbacks.capture import native
from attn_callbacks.capture.call import AttentionCall
from attn_callbacks.capture.eager import SOFTMAXES, SoftmaxWatch
from attn_callbacks.capture.fused import flex_call, sdpa_call
from attn_callbacks.capture.multi_head import inside_multi_head
from attn_callbacks.capture.scope import ModuleScope
from attn_callbacks.capture.shared import Shared, replaced

__all__ = ["AttentionSites"]

_SDPA = F.scaled_dot_product_attention
_MULTI_HEAD = F.multi_head_attention_forward
_NATIVE_FIRST = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)


class AttentionSites(TorchFunctionMode):
    """While active, pass every attention call of this thread to ``emit`` and compute exactly what was asked for.

    Args:
        scope: Knows the executing module.
        emit: Receives each call, not yet named; from a softmax of the model's own, its weights come along. Returns what
            the model goes on with in place of the call's output; ``None`` leaves it.
        is_paused: Tells that what runs now is not the model.
        changes: ``emit`` may return other outputs: the native kernels, which have none, are then left aside.
    """

    def __init__(
        self,
        scope: ModuleScope,
        emit: Callable[..., Tensor | None],
        is_paused: Callable[[], bool],
        changes: bool = False,
    ) -> None:
        super().__init__()
        self._is_paused = is_paused
        self._scope = scope
        self._emit = emit
        self._changes = changes
        self._softmax = SoftmaxWatch(emit)
        self._padded_length: int | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._is_paused():
            return func(*args, **kwargs)
        if func is _MULTI_HEAD:
            with inside_multi_head(self._emit, self._changes, *args, **kwargs):
                return func(*args, **kwargs)
        output = func(*args, **kwargs)
        call = self._read(output, func, args, kwargs)
        if call is not None:
            changed = self._emit(call)
            if changed is not None:
                return (changed, *output[1:]) if isinstance(output, tuple) else changed
        elif func in SOFTMAXES:
            self._softmax.made(output, args, kwargs)
        elif self._softmax.pending:
            return self._softmax.used(func, args, kwargs, output, self._scope.modules())
        return output

    def forget(self, weights: Tensor) -> None:
        """Do not report ``weights`` as a softmax of the model's own: the model reports it itself."""
        self._softmax.forget(weights)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Watch all sites of this thread for the length of a ``with`` block."""
        with nullcontext() if self._changes else _NATIVE_PATH.held(), self:
            _scopes.open.append(self._scope)
            try:
                yield
            finally:
                _scopes.open.remove(self._scope)

    def _read(self, output: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AttentionCall | None:
        if func is _SDPA:
            return sdpa_call(output, *args, **kwargs)
        if func in native.KERNELS:
            return native.KERNELS[func](self._padded_length, *args, **kwargs)
        if func is torch._nested_tensor_from_mask:
            self._padded_length = args[0].shape[1]
        elif func is Tensor.to_padded_tensor:
            self._padded_length = None
        elif getattr(func, "__name__", "") == "flex_attention" and len(args) > 2:
            return flex_call(output, *args, **kwargs)
        return None


class _Scopes(threading.local):
    def __init__(self) -> None:
        self.open: list[ModuleScope] = []


_scopes = _Scopes()


def _keep_native_path(original: Callable[..., Any]) -> Callable[..., Any]:
    """Let ``nn.TransformerEncoder`` keep its native path, which it leaves when it sees any mode active.

    Its kernels then arrive at the mode as calls like all others, and the model's output stays what it would have been.
    """

    def has_torch_function(tensors: Any) -> Any:
        runs_native = any(isinstance(scope.module, _NATIVE_FIRST) for scope in _scopes.open)
        modes = torch.overrides._get_current_function_mode_stack()
        if not runs_native or not all(isinstance(mode, AttentionSites) for mode in modes):
            return original(tensors)  # without a recorder, the path would be left as well
        return any(isinstance(t, Tensor) and type(t).__torch_function__ not in _PLAIN for t in tensors)

    return has_torch_function


_PLAIN = (Tensor.__torch_function__, nn.Parameter.__torch_function__)
_NATIVE_PATH = Shared(lambda: replaced(torch.overrides, "has_torch_function", _keep_native_path))
