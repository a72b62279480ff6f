"""Meet the gradient at one attention call and turn it into the gradients of gates on its heads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attn_callbacks.callbacks._guard import Guard
from attn_callbacks.capture import AttentionCall
from attn_callbacks.functional.importance import gate_gradient

__all__ = ["meet_gradient"]


def meet_gradient(
    call: AttentionCall, deliver: Callable[[Tensor], None], wanted: Callable[[], bool], guard: Guard
) -> bool:
    """Pass the gate gradient of every backward through ``call`` on, ``(batch, heads)``; ``False`` if it has no graph.

    The backward computes what it would have computed. Holds the values of one tensor, without their graph, until that
    graph is used up or gone.

    Args:
        call: A call of the present forward.
        deliver: Receives the gate gradient.
        wanted: Asked at each backward whether anybody still listens.
        guard: Keeps in whatever goes wrong.
    """
    batch, heads, *_ = call.shape
    used = call.recorded if call.output is None else call.output
    if used is None or not used.requires_grad or used.shape[:-2].numel() != batch * heads:
        return False
    if call.output is not None and used._version:  # changed in place since: no longer what attention returned
        return False
    source = used if call.output is not None or used._base is None else used._base
    hook = _Hook(source, used, lambda gates: deliver(gates.reshape(batch, heads)), wanted, guard)
    source.register_hook(hook)
    return True


class _Hook:
    """What `source` calls with its gradient. A handle of the values, not of the graph: it would hold itself alive."""

    def __init__(
        self,
        source: Tensor,
        used: Tensor,
        deliver: Callable[[Tensor], None],
        wanted: Callable[[], bool],
        guard: Guard,
    ) -> None:
        self._values: Tensor | None = used.detach()
        self._version = used._version
        self._cut = None if used is source else _Cut(source, used)
        self._deliver, self._wanted, self._guard = deliver, wanted, guard

    def __call__(self, gradient: Tensor) -> None:
        with self._guard.block():
            values = self._values
            if values is None or not self._wanted() or self._guard.off:
                return
            if not _graph_is_kept():
                self._values = None  # autograd lets go of it as well
            if values._version == self._version:
                gradient = gradient.detach() if self._cut is None else self._cut(gradient.detach())
                self._deliver(gate_gradient(values, gradient))


class _Cut:
    """Cuts out of the gradient of a tensor what belongs to a view of it: the model may go on with another view."""

    def __init__(self, base: Tensor, view: Tensor) -> None:
        self._laid_out = base.shape, base.stride()
        self._part = view.shape, view.stride(), view.storage_offset() - base.storage_offset()

    def __call__(self, gradient: Tensor) -> Tensor:
        like_base = gradient.new_empty(0).new_empty_strided(*self._laid_out).copy_(gradient)
        return like_base.as_strided(*self._part)


def _graph_is_kept() -> bool:
    """Tell whether the backward that runs was asked for with ``retain_graph``, so that another may follow it."""
    # private; without it values stay for as long as their graph
    asked: Callable[[], bool] | None = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return asked is None or asked()
