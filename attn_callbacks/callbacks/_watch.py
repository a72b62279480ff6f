"""What observers put around a step: a recorder that cannot stop training, and the outputs of a module's forward."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from attn_callbacks._lightning import rank_zero_warn
from attn_callbacks.capture import AttentionCall, AttentionNotFoundError, AttentionRecorder

__all__ = ["QuietRecorder", "forward_outputs"]


class QuietRecorder:
    """A recorder for observers: where a plain one raises, it warns once and switches itself off.

    Args:
        owner: Name of the callback, for the warning.
        on_call: Receives every selected call.
        layers: Names or glob patterns; ``None`` selects all.
    """

    def __init__(self, owner: str, on_call: Callable[[AttentionCall], None], layers: Sequence[str] | None) -> None:
        self.disabled = False
        self._owner = owner
        self._on_call = on_call
        self._layers = layers

    @contextmanager
    def watch(self, module: nn.Module) -> Iterator[None]:
        """Record ``module`` inside the block."""
        if self.disabled:
            yield
            return
        recorder = AttentionRecorder(module, self._layers, on_call=self._receive)
        recorder.__enter__()
        try:
            yield
        except BaseException:
            recorder.__exit__(*sys.exc_info())
            raise
        try:
            recorder.__exit__(None, None, None)
        except (AttentionNotFoundError, ValueError) as error:
            self._disable(error)

    def _receive(self, call: AttentionCall) -> None:
        if self.disabled:
            return
        try:
            with torch.no_grad():
                self._on_call(call)
        except Exception as error:  # noqa: BLE001  an observer never ends a run
            self._disable(error)

    def _disable(self, error: Exception) -> None:
        self.disabled = True
        rank_zero_warn(f"`{self._owner}` is switched off for the rest of this run: {type(error).__name__}: {error}")


@contextmanager
def forward_outputs(module: nn.Module) -> Iterator[list[Any]]:
    """Collect what ``module`` and its direct children return while none of them runs inside another."""
    watched = {id(module), *(id(child) for child in module.children())}
    outputs: list[Any] = []
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
        if "torch._dynamo" in sys.modules:  # compiled code would be compiled again for the sake of the hooks
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for handle in (register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)):
            stack.callback(handle.remove)
        yield outputs
