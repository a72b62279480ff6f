"""Start a forward in its middle: what modules returned before an attention call is used again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Prefix", "PrefixRecorder"]

Forward = Callable[..., Any]


@dataclass(eq=False)
class _Entry:
    """One call of a module."""

    module: nn.Module
    start: int
    output: Any = None
    versions: tuple[tuple[Tensor, int], ...] = ()
    is_kept: bool = False
    finished: list[_Entry] = field(default_factory=list)  # calls made in it that have returned


class Prefix:
    """The calls of modules that had returned before an attending module was entered, the outermost ones.

    Nothing in them depends on that attention, so a forward in which only it and what follows is changed may take their
    outputs as they were. Holds these outputs.

    Args:
        calls: By module: its calls as a replay meets them, those that are to be run as ``None``.
        skipped: Numbers of attention calls that a replay does not meet.
    """

    def __init__(self, calls: list[tuple[nn.Module, list[_Entry | None]]], skipped: frozenset[int]) -> None:
        self.skipped = skipped
        self._calls = calls

    @property
    def is_intact(self) -> bool:
        """No output was changed in place since."""
        entries = (entry for _, calls in self._calls for entry in calls if entry is not None)
        return all(_version(tensor) == version for entry in entries for tensor, version in entry.versions)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Let the modules return what they returned; each of their calls counts once, in order."""
        with ExitStack() as stack:
            for module, calls in self._calls:
                stack.enter_context(_spied(module, _replay(iter(calls))))
            yield


class PrefixRecorder:
    """Watches one run of a model and keeps a `Prefix` for each attention call that is asked for.

    Holds the outputs of the outermost modules: about one hidden state for each block and norm.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._root = _Entry(model, 0)
        self._open = [self._root]
        self._started = 0
        self._stacks: list[tuple[_Entry, ...]] = []  # open calls around each attention call

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Watch for the length of a ``with`` block."""
        with ExitStack() as stack:
            for module in self._model.modules():
                stack.enter_context(_spied(module, self._spy(module)))
            yield

    def meet(self, wanted: bool) -> Prefix | None:
        """Note an attention call while it is made, and return its prefix if it is ``wanted``."""
        self._stacks.append(tuple(self._open))
        return self._prefix() if wanted else None

    def _prefix(self) -> Prefix:
        # what the attending module itself has called stays: a dropout between softmax and product tells it apart
        taken = {entry for each in self._open[:-1] for entry in each.finished}
        calls: dict[nn.Module, list[_Entry | None]] = {entry.module: [] for entry in taken}
        for entry in sorted([*taken, *self._open[1:]], key=lambda entry: entry.start):
            if entry.module in calls:
                calls[entry.module].append(entry if entry in taken else None)
        for entry in taken:
            entry.is_kept = True
        skipped = (n for n, stack in enumerate(self._stacks) if not taken.isdisjoint(stack))
        return Prefix(list(calls.items()), frozenset(skipped))

    def _spy(self, module: nn.Module) -> Callable[[Forward], Forward]:
        def wrap(forward: Forward) -> Forward:
            def spy(*args: Any, **kwargs: Any) -> Any:
                entry = self._enter(module)
                output = forward(*args, **kwargs)
                self._leave(entry, output)
                return output

            return spy

        return wrap

    def _enter(self, module: nn.Module) -> _Entry:
        self._started += 1
        entry = _Entry(module, self._started)
        self._open.append(entry)
        return entry

    def _leave(self, entry: _Entry, output: Any) -> None:
        while self._open.pop() is not entry:  # calls that ended in an exception which the model caught
            pass
        entry.output = output
        entry.versions = tuple((tensor, _version(tensor)) for tensor in _tensors(output))
        self._open[-1].finished.append(entry)
        for inner in entry.finished:
            if not inner.is_kept:
                inner.output, inner.versions = None, ()
        entry.finished = []


def _replay(calls: Iterator[_Entry | None]) -> Callable[[Forward], Forward]:
    def wrap(forward: Forward) -> Forward:
        def spy(*args: Any, **kwargs: Any) -> Any:
            entry = next(calls, None)
            return forward(*args, **kwargs) if entry is None else entry.output

        return spy

    return wrap


@contextmanager
def _spied(module: nn.Module, wrap: Callable[[Forward], Forward]) -> Iterator[None]:
    """Replace ``module.forward`` for a while. Not a hook: hooks cannot keep a forward from running."""
    has_own = "forward" in vars(module)
    if isinstance(module, torch.jit.ScriptModule) or not (has_own or type(module).forward is not nn.Module.forward):
        yield
        return
    own, spy = vars(module).get("forward"), wrap(module.forward)
    object.__setattr__(module, "forward", spy)
    try:
        yield
    finally:
        if vars(module).get("forward") is spy:
            object.__delattr__(module, "forward")
            if own is not None:
                object.__setattr__(module, "forward", own)


def _tensors(whole: Any) -> Iterator[Tensor]:
    if isinstance(whole, Tensor):
        yield whole
    elif isinstance(whole, (list, tuple, Mapping)):
        for part in whole.values() if isinstance(whole, Mapping) else whole:
            yield from _tensors(part)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # inference tensors count no changes
