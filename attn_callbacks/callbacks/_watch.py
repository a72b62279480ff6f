"""What is entered around a step: a recorder that cannot end a run, and the outputs of a module's forward."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from attn_callbacks.callbacks._guard import Guard
from attn_callbacks.callbacks._layers import is_generation_step
from attn_callbacks.capture import AttentionCall, AttentionNotFoundError, AttentionRecorder
from attn_callbacks.capture.compiled import run_eagerly

__all__ = ["QuietRecorder", "forward_outputs"]


class QuietRecorder(AttentionRecorder):
    """A recorder for observers, entered anew for each step.

    Args:
        model: The model.
        layers: Names or glob patterns; ``None`` selects all.
        receive: Receives every selected call, without gradients.
        guard: Keeps in whatever goes wrong.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str] | None,
        receive: Callable[[AttentionCall], None],
        guard: Guard,
    ) -> None:
        super().__init__(model, layers, on_call=self._pass_on)
        self.required = True
        """A step without attention is worth a warning; else its model is left alone from then on."""
        self._receive = receive
        self._guard = guard

    def watch(self) -> AbstractContextManager[Any]:
        """Return what is to be entered around a step."""
        return nullcontext() if self._guard.off else self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._guard.block():
            try:
                super().__exit__(kind, error, trace)
            except AttentionNotFoundError:
                if self.required:
                    raise
                self._guard.off = True

    def _pass_on(self, call: AttentionCall) -> None:
        with self._guard.block(), torch.no_grad():
            if not self._guard.off and not is_generation_step(call):
                self._receive(call)


@contextmanager
def forward_outputs(module: nn.Module, outputs: list[Any]) -> Iterator[None]:
    """Append what ``module`` and its direct children return while none of them runs inside another."""
    watched = {id(module), *(id(child) for child in module.children())}
    inside: list[nn.Module] = []
    thread = threading.get_ident()

    def enter(entered: nn.Module, _args: Any) -> None:
        if id(entered) in watched and threading.get_ident() == thread:
            inside.append(entered)

    def leave(left: nn.Module, _args: Any, output: Any) -> None:
        if inside and inside[-1] is left and threading.get_ident() == thread:
            inside.pop()
            if not inside:
                outputs.append(output)

    with ExitStack() as stack:
        stack.enter_context(run_eagerly(module))  # compiled code would be compiled again for the sake of the hooks
        for handle in (register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)):
            stack.callback(handle.remove)
        yield
