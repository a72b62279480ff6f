"""See inside ``F.multi_head_attention_forward``, where no mode looks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_callbacks.capture.call import AttentionCall
from attn_callbacks.capture.fused import sdpa_call
from attn_callbacks.capture.shared import Shared, replaced

__all__ = ["inside_multi_head"]


@dataclass
class _Listener:
    emit: Callable[[AttentionCall], Tensor | None]
    is_cross: bool
    heads: int
    changes: bool
    scores: Tensor | None = None  # of the softmax whose product with the values is still to come

    def sdpa(self, output: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        call = sdpa_call(output, *args, **kwargs)
        return None if call is None else self.emit(replace(call, is_cross=self.is_cross))

    def softmax(self, weights: Tensor, scores: Tensor, *_: Any, **__: Any) -> None:
        if self.changes:  # what a head puts out exists after the product only
            self.scores = scores
        else:
            self.emit(self._call(scores, weights))

    def bmm(self, output: Tensor, *_: Any, **__: Any) -> Tensor | None:
        scores, self.scores = self.scores, None
        return None if scores is None else self.emit(self._call(scores, output))

    def _call(self, scores: Tensor, output: Tensor) -> AttentionCall:
        by_head = scores.reshape(-1, self.heads, *scores.shape[-2:])  # from (batch * heads, queries, keys)
        return AttentionCall(name="", is_cross=self.is_cross, scores=by_head, output=output)


class _Listening(threading.local):
    def __init__(self) -> None:
        self.listeners: list[_Listener] = []


_listening = _Listening()


@contextmanager
def inside_multi_head(
    emit: Callable[[AttentionCall], Tensor | None],
    changes: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    *_: Any,
    **__: Any,
) -> Iterator[None]:
    """While ``F.multi_head_attention_forward`` runs with these arguments, pass its attention to ``emit``.

    A function mode is off inside its own handler. What is called in there is seen by its name instead: for the length
    of the call the module globals are replaced, and other threads pass through the replacements unheard. With
    ``changes``, what ``emit`` returns takes the place of what the heads put out.
    """
    listener = _Listener(emit, is_cross=not _same(query, key), heads=num_heads, changes=changes)
    with ExitStack() as stack:
        for site in (_SDPA, _SOFTMAX, _BMM) if changes else (_SDPA, _SOFTMAX):
            stack.enter_context(site.held())
        _listening.listeners.append(listener)
        try:
            yield
        finally:
            _listening.listeners.remove(listener)


def _announced(site: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def announced(*args: Any, **kwargs: Any) -> Any:
            output = function(*args, **kwargs)
            for listener in _listening.listeners:
                changed = getattr(listener, site)(output, *args, **kwargs)
                output = output if changed is None else changed
            return output

        return announced

    return wrap


_SDPA = Shared(lambda: replaced(F, "scaled_dot_product_attention", _announced("sdpa")))
_SOFTMAX = Shared(lambda: replaced(F, "softmax", _announced("softmax")))
_BMM = Shared(lambda: replaced(torch, "bmm", _announced("bmm")))


def _same(query: Tensor, key: Tensor) -> bool:
    """The two are one sequence, also after a backward hook has made two views of it."""
    if query is key:
        return True
    base, other = (tensor if tensor._base is None else tensor._base for tensor in (query, key))
    return base is other and query.shape == key.shape and query.storage_offset() == key.storage_offset()
