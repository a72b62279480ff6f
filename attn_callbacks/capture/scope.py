"""Which module of a model is executing: the path of its call stack, without a hook on any module."""

from __future__ import annotations

import inspect
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as _module
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from attn_callbacks.capture.call import AttentionCall
from attn_callbacks.capture.eager import share_memory

__all__ = ["ModuleScope"]

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_OTHER_SEQUENCE = frozenset({"key_value_states", "encoder_hidden_states", "memory", "mem", "context", "cross_states"})


@dataclass
class _Pending:
    order: int
    call: AttentionCall
    weights: Tensor | None  # what the model's own softmax gave, to recognise it in `record`


@dataclass
class _Frame:
    module: nn.Module
    name: str | None  # None: the module is not the model's
    is_foreign: bool = False
    calls: list[_Pending] = field(default_factory=list)


class ModuleScope:
    """Follow the calls of a model's modules and name the attention calls made in them.

    Two process-wide forward hooks exist while the scope is open; hooks on the modules themselves would make
    ``nn.TransformerEncoder`` leave its native path and so change what the model computes. Other threads are ignored.

    Args:
        model: The model whose module paths become names.
        deliver: Called as ``deliver(order, call)`` once the module in which a call happened has returned; not after an
            exception in it.
    """

    def __init__(self, model: nn.Module, deliver: Callable[[int, AttentionCall], None]) -> None:
        self.entered = False  # some module of the model ran
        self._root = model
        self._deliver = deliver
        self._paths = {id(module): _readable(path) for path, module in model.named_modules()}
        self._thread = threading.get_ident()
        self._frames: list[_Frame] = []
        self._counts: Counter[str] = Counter()
        self._order = 0

    @contextmanager
    def open(self) -> Iterator[None]:
        """Follow modules for the length of a ``with`` block."""
        entering = register_module_forward_pre_hook(self._enter)
        leaving = register_module_forward_hook(self._leave, with_kwargs=True, always_call=True)
        try:
            yield
        finally:
            entering.remove()
            leaving.remove()
            _module._global_forward_hooks_with_kwargs.pop(leaving.id, None)  # which torch forgets

    @property
    def module(self) -> nn.Module | None:
        """The innermost executing module; ``None`` outside of all modules."""
        return self._frames[-1].module if self._frames else None

    def modules(self) -> Iterator[nn.Module]:
        """Yield the executing modules, from the innermost to the first that has a name."""
        for frame in reversed(self._frames):
            yield frame.module
            if frame.name is not None:
                return

    def named(self, call: AttentionCall) -> AttentionCall | None:
        """Name a call at once, and count it; ``None`` for another model's. Whether it is a cross may not show yet.

        Args:
            call: What was seen.
        """
        if self._frames and self._frames[-1].is_foreign:
            return None
        name = self._name(call)[0]
        index = self._counts[name]
        self._counts[name] += 1
        return replace(call, name=name, index=index)

    def add(self, call: AttentionCall, weights: Tensor | None = None) -> None:
        """Name ``call`` after the executing module (a name it already has becomes the last part).

        Args:
            call: What was seen.
            weights: By which :meth:`forget` recognises the call.
        """
        if self._frames and self._frames[-1].is_foreign:
            return
        self._order += 1
        name, frame = self._name(call)
        pending = _Pending(self._order, replace(call, name=name), weights)
        if frame is None:
            self._deliver_indexed(pending, is_cross=call.is_cross)
        else:
            frame.calls.append(pending)

    def _name(self, call: AttentionCall) -> tuple[str, _Frame | None]:
        frame = next((frame for frame in reversed(self._frames) if frame.name is not None), None)
        path = "" if frame is None or frame.name is None else frame.name
        return ".".join(part for part in (path, call.name) if part) or type(self._root).__name__, frame

    def forget(self, weights: Tensor) -> None:
        """Drop the call that was added with ``weights``, if its module has not returned yet."""
        for frame in self._frames:
            frame.calls = [c for c in frame.calls if c.weights is None or not share_memory(c.weights, weights)]

    def _deliver_indexed(self, pending: _Pending, is_cross: bool) -> None:
        name = pending.call.name
        call = replace(pending.call, index=self._counts[name], is_cross=is_cross)
        self._counts[name] += 1
        self._deliver(pending.order, call)

    def _enter(self, module: nn.Module, _args: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        name = self._paths.get(id(module))
        self.entered = self.entered or name is not None
        if module is self._root and not any(frame.module is module for frame in self._frames):
            self._counts.clear()  # a new forward
        self._frames.append(_Frame(module, name, is_foreign=name is None and self._is_foreign(module)))

    def _is_foreign(self, module: nn.Module) -> bool:
        """Something else's module, as a teacher is; a module made on the fly to compute something is not."""
        inherited = not self._frames or self._frames[-1].is_foreign
        return inherited or next(module.parameters(), None) is not None

    def _leave(self, module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
        if threading.get_ident() != self._thread or not any(frame.module is module for frame in self._frames):
            return
        while True:  # frames above the module's own are left over from an exception that torch has no hook for
            frame = self._frames.pop()
            if frame.module is module:
                break
        if len(rest) == 1 or not frame.calls:  # after an exception torch passes the result alone
            return
        crosses = _reads_other_sequence(module, args, rest[0])
        for pending in frame.calls:
            self._deliver_indexed(pending, is_cross=pending.call.is_cross or crosses)


def _readable(path: str) -> str:
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


@lru_cache(maxsize=1024)
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


def _reads_other_sequence(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    given = {**dict(zip(_parameters(type(module).forward), args, strict=False)), **kwargs}
    first = args[0] if args else next(iter(given.values()), None)
    return any(isinstance(given.get(name), Tensor) and given[name] is not first for name in _OTHER_SEQUENCE)
