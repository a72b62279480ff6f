"""Record the attention of a model for the length of a ``with`` block."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType

import torch
from torch import Tensor, nn

from attn_callbacks.capture import listening
from attn_callbacks.capture.call import AttentionCall
from attn_callbacks.capture.compiled import run_eagerly
from attn_callbacks.capture.decoders import Decoders
from attn_callbacks.capture.scope import ModuleScope
from attn_callbacks.capture.selection import check_found, checked_layers, checked_model, is_selected
from attn_callbacks.capture.sites import AttentionSites

__all__ = ["AttentionRecorder", "record"]


class _Active(threading.local):
    def __init__(self) -> None:
        self.recorders: list[AttentionRecorder] = []


_active = _Active()


class AttentionRecorder:
    """See the attention of every layer while a model runs, without changing what it computes.

    Inside the ``with`` block each call of attention becomes an :class:`AttentionCall`: fused kernels
    (``scaled_dot_product_attention``, ``nn.MultiheadAttention``, the native path of ``nn.TransformerEncoder``,
    FlexAttention), a softmax over keys followed by a product with the values, and whatever the model hands to
    :func:`record`. Output, gradients and random numbers of the model stay bit-identical. A compiled model runs eagerly
    inside the block and keeps its compiled graphs for afterwards. Nothing remains installed after the block.

    Costs 2 microseconds for each torch function that the model calls, and the memory of queries, keys, values and
    outputs of the calls that are kept; ``on_call`` keeps none. Recorders nest; one that was entered later leaves
    earlier.

    Not seen: nested tensors outside of ``nn.TransformerEncoder`` and ``nn.MultiheadAttention``, scripted and exported
    modules, kernels that are not torch functions (flash-attn, xformers), other threads, and banded, chunked and
    landmark attention (Longformer, LED's encoder, Nystromformer), which is not one matrix of queries x keys.

    Args:
        model: The model, or a module around it; paths below it become names. Attention of other models is not recorded.
        layers: Names or glob patterns of the modules to record; a name includes everything below it. ``None``: all.
        on_call: Receives each call when its module returns, in place of :attr:`calls`. Attention that it computes
            itself is not recorded.

    Raises:
        AttentionNotFoundError: On leaving the block, if the model ran and no attention was seen.
        TypeError: If ``model`` is no module, or ``layers`` a single string.
        ValueError: On leaving the block, if the model ran and an entry of ``layers`` matched none of its attention.

    Example:
        >>> model = nn.MultiheadAttention(8, num_heads=2, batch_first=True)
        >>> tokens = torch.ones(1, 3, 8)
        >>> with AttentionRecorder(model) as recorder:
        ...     output, _ = model(tokens, tokens, tokens)
        >>> [(call.name, call.index, tuple(call.weights().shape)) for call in recorder.calls]
        [('MultiheadAttention', 0, (1, 2, 3, 3))]
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str] | None = None,
        on_call: Callable[[AttentionCall], None] | None = None,
    ) -> None:
        self.model, self.layers = checked_model(model), checked_layers(layers)
        self.on_call = on_call
        self._kept: list[tuple[int, AttentionCall]] = []
        self._seen: dict[str, None] = {}  # an ordered set
        self._decoders = Decoders(self.model)
        self._sites: AttentionSites | None = None
        self._scope: ModuleScope | None = None
        self._exit: ExitStack | None = None

    @property
    def calls(self) -> tuple[AttentionCall, ...]:
        """The recorded calls, in the order of execution; empty with ``on_call``."""
        return tuple(call for _, call in sorted(self._kept, key=lambda entry: entry[0]))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all attention modules seen so far, selected or not, in the order of execution."""
        return tuple(self._seen)

    def __enter__(self) -> AttentionRecorder:
        if self._exit is not None:
            raise RuntimeError("`AttentionRecorder` is already recording; make a second one to nest.")
        self._kept, self._seen, self._decoders = [], {}, Decoders(self.model)
        self._scope = ModuleScope(self.model, self._deliver)
        self._sites = AttentionSites(self._scope, self._add, listening.is_paused)
        with ExitStack() as stack:
            stack.enter_context(run_eagerly(self.model))
            stack.enter_context(self._scope.open())
            stack.enter_context(self._sites.open())
            _active.recorders.append(self)
            stack.callback(_active.recorders.remove, self)
            self._exit = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stack, self._exit = self._exit, None
        scope, self._scope = self._scope, None
        self._sites = None  # holds tensors
        if stack is not None:
            stack.close()
        if kind is None and scope is not None and scope.entered:
            check_found(self.model, self._seen, self.layers)

    def _add(self, call: AttentionCall, weights: Tensor | None = None) -> None:
        # inside backward, activation checkpointing runs the forward a second time: the first was counted
        is_counted = listening.is_in_backward()
        if self._scope is not None and not is_counted and not listening.is_paused():
            self._scope.add(call if torch.is_grad_enabled() else call.detach(), weights)

    def _record(self, name: str, weights: Tensor) -> None:
        if self._scope is not None and self._sites is not None:
            self._sites.forget(weights)
            self._scope.forget(weights)
        self._add(AttentionCall(name=name, recorded=weights))

    def _deliver(self, order: int, call: AttentionCall) -> None:
        self._seen.setdefault(call.name)
        call = self._decoders.told(call)
        if not is_selected(call.name, self.layers):
            return
        if self.on_call is None:
            self._kept.append((order, call))
            return
        with listening.paused():
            self.on_call(call)


def record(name: str, weights: Tensor) -> None:
    """Show attention weights to the recorders that are active; without one, do nothing.

    For models that compute attention in a way no recorder recognises: one line where the weights exist. A softmax that
    a recorder recognises by itself is not counted twice.

    Args:
        name: A short name; the path of the executing module is put in front.
        weights: Attention weights before dropout, rows sum to one; rows of zeros are invalid. Give the tensor that the
            model computed, or a view of it.

    Shape:
        - weights: ``(batch, heads, queries, keys)``

    Raises:
        ValueError: If ``weights`` does not have four axes.

    Example:
        >>> class Pool(nn.Module):
        ...     def forward(self, tokens):
        ...         weights = tokens.mean(-1).softmax(-1)  # (batch, keys)
        ...         record("pool", weights[:, None, None])
        ...         return weights[:, None] @ tokens
        >>> with AttentionRecorder(Pool()) as recorder:
        ...     _ = recorder.model(torch.ones(1, 2, 3))
        >>> recorder.calls[0].name, recorder.calls[0].weights()
        ('pool', tensor([[[[0.5000, 0.5000]]]]))
    """
    if _active.recorders and weights.ndim != 4:
        shape = tuple(weights.shape)
        raise ValueError(f"`weights` must have axes (batch, heads, queries, keys), got shape {shape}.")
    for recorder in _active.recorders:
        recorder._record(name, weights)
