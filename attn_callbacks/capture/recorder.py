"""Record the attention of a model for the length of a ``with`` block."""

from __future__ import annotations

import fnmatch
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType

import torch
from torch import Tensor, nn

from attn_callbacks.capture.call import AttentionCall
from attn_callbacks.capture.scope import ModuleScope
from attn_callbacks.capture.sites import AttentionSites

__all__ = ["AttentionNotFoundError", "AttentionRecorder", "record"]


class AttentionNotFoundError(RuntimeError):
    """A model ran under a recorder and no attention was seen."""


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

    Costs 2-3 microseconds for each torch function that the model calls, and the memory of queries, keys and values of
    the calls that are kept; ``on_call`` keeps none.

    Args:
        model: The model, or a module around it; paths below it become names.
        layers: Names or glob patterns of the modules to record; a name includes everything below it. ``None``: all.
        on_call: Receives each call when its module returns, in place of :attr:`calls`.

    Raises:
        AttentionNotFoundError: On leaving the block, if the model ran and no attention was seen.
        ValueError: If an entry of ``layers`` matches no module, or (on leaving the block) no attention.

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
        if not isinstance(model, nn.Module):
            raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
        if isinstance(layers, str):
            raise TypeError(f"`layers` must be a sequence of names, got the string {layers!r}. Write [{layers!r}].")
        self.model = model
        self.layers = None if layers is None else tuple(layers)
        self.on_call = on_call
        self._kept: list[tuple[int, AttentionCall]] = []
        self._seen: dict[str, None] = {}  # an ordered set
        self._exit: ExitStack | None = None
        self._paused = False

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
        self._kept, self._seen = [], {}
        self._scope = ModuleScope(self.model, self._deliver)
        self._sites = AttentionSites(self._scope, self._add)
        with ExitStack() as stack:
            if "torch._dynamo" in sys.modules:  # else nothing is compiled, and the import would take a second
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            for handle in self._scope.open():
                stack.callback(handle.remove)
            stack.enter_context(self._sites.native_path_open())
            stack.enter_context(self._sites)
            _active.recorders.append(self)
            stack.callback(_active.recorders.remove, self)
            self._exit = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stack, self._exit = self._exit, None
        if stack is not None:
            stack.close()
        if kind is None and self._scope.entered:
            self._check_found()

    def _add(self, call: AttentionCall) -> None:
        if not self._paused:
            self._scope.add(call)

    def _record(self, name: str, weights: Tensor) -> None:
        self._sites.forget(weights)
        self._add(AttentionCall(name=name, recorded=weights if torch.is_grad_enabled() else weights.detach()))

    def _deliver(self, order: int, call: AttentionCall) -> None:
        self._seen.setdefault(call.name)
        if self.layers is not None and not any(_selects(pattern, call.name) for pattern in self.layers):
            return
        if self.on_call is None:
            self._kept.append((order, call))
            return
        self._paused = True  # what the receiver computes is not the model's attention
        try:
            self.on_call(call)
        finally:
            self._paused = False

    def _check_found(self) -> None:
        if not self._seen:
            raise AttentionNotFoundError(
                f"No attention was seen in the forward of `{type(self.model).__name__}`. Looked for: "
                "scaled_dot_product_attention, nn.MultiheadAttention and nn.Transformer layers, flex_attention, and a "
                "softmax over the last axis followed by a product with values. Choose a backend that goes through one "
                "of them (Hugging Face: attn_implementation='sdpa'), or call `attn_callbacks.record(name, weights)` "
                "where the model computes its weights."
            )
        for pattern in self.layers or ():
            if not any(_selects(pattern, name) for name in self._seen):
                known = ", ".join(map(repr, self._seen))
                raise ValueError(f"`layers` names no attention module: {pattern!r}. Known: {known}.")


def record(name: str, weights: Tensor) -> None:
    """Show attention weights to the recorders that are active; without one, do nothing.

    For models that compute attention in a way no recorder recognises: one line where the weights exist.

    Args:
        name: A short name; the path of the executing module is put in front.
        weights: Attention weights before dropout, rows sum to one; rows of zeros are invalid.

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


def _selects(pattern: str, name: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")
