"""Which module of a model is executing: the path of its call stack, without a hook on any module."""

from __future__ import annotations

import inspect
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

from attn_callbacks.capture.call import AttentionCall

__all__ = ["ModuleScope"]

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_OTHER_SEQUENCE = frozenset({"key_value_states", "encoder_hidden_states", "memory", "mem", "context", "cross_states"})


@dataclass
class _Frame:
    module: nn.Module
    name: str | None  # None: not a module of the watched model
    calls: list[tuple[int, AttentionCall]] = field(default_factory=list)


class ModuleScope:
    """Follow the calls of a model's modules and name the attention calls made in them.

    Two process-wide forward hooks exist while the scope is open; hooks on the modules themselves would make
    ``nn.TransformerEncoder`` leave its native path and so change what the model computes. Other threads are ignored.

    Args:
        model: The model whose module paths become names.
        deliver: Called as ``deliver(order, call)`` once the module in which a call happened has returned.
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

    def open(self) -> tuple[RemovableHandle, RemovableHandle]:
        """Install the two hooks; remove the returned handles to close the scope."""
        return (
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, with_kwargs=True, always_call=True),
        )

    @property
    def module(self) -> nn.Module | None:
        """The innermost executing module; ``None`` outside of all modules."""
        return self._frames[-1].module if self._frames else None

    def watches_this_thread(self) -> bool:
        """Tell whether the caller runs in the thread that opened the scope."""
        return threading.get_ident() == self._thread

    def add(self, call: AttentionCall) -> None:
        """Name ``call`` after the executing module (a name it already has becomes the last part)."""
        frame = next((frame for frame in reversed(self._frames) if frame.name is not None), None)
        if frame is None and self._frames:
            return  # a module of some other model
        path = "" if frame is None or frame.name is None else frame.name
        name = ".".join(part for part in (path, call.name) if part) or type(self._root).__name__
        named = replace(call, name=name, index=self._counts[name])
        self._counts[name] += 1
        self._order += 1
        if frame is None:
            self._deliver(self._order, named)
        else:
            frame.calls.append((self._order, named))

    def _enter(self, module: nn.Module, _args: Any) -> None:
        if not self.watches_this_thread():
            return
        name = self._paths.get(id(module))
        self.entered = self.entered or name is not None
        if module is self._root and not any(frame.module is module for frame in self._frames):
            self._counts.clear()  # a new forward
        self._frames.append(_Frame(module, name))

    def _leave(self, module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
        if not self.watches_this_thread() or not any(frame.module is module for frame in self._frames):
            return
        kwargs = rest[0] if len(rest) == 2 else {}  # after an exception torch passes no keyword arguments
        while self._frames:
            frame = self._frames.pop()
            for order, call in frame.calls:
                is_cross = call.is_cross or (frame.module is module and _reads_other_sequence(module, args, kwargs))
                self._deliver(order, replace(call, is_cross=is_cross))
            if frame.module is module:
                return


def _readable(path: str) -> str:
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


@lru_cache(maxsize=1024)
def _parameters(kind: type[nn.Module]) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def _reads_other_sequence(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    given = {**dict(zip(_parameters(type(module)), args, strict=False)), **kwargs}
    first = args[0] if args else next(iter(given.values()), None)
    return any(isinstance(given.get(name), Tensor) and given[name] is not first for name in _OTHER_SEQUENCE)
