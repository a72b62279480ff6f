"""Whether what runs in this thread is the model, or what somebody computes about it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["is_in_backward", "is_paused", "paused"]


class _State(threading.local):
    def __init__(self) -> None:
        self.paused = False


_state = _State()


def is_paused() -> bool:
    """Tell whether this thread computes something that is not the model's, for all who listen."""
    return _state.paused


@contextmanager
def paused() -> Iterator[None]:
    """Let nobody listen for the length of a ``with`` block; modes that listen are not even passed through."""
    before, _state.paused = _state.paused, True
    try:
        with torch._C.DisableTorchFunction():
            yield
    finally:
        _state.paused = before


def is_in_backward() -> bool:
    """Tell whether a backward runs: activation checkpointing runs the forward a second time in it."""
    return torch._C._current_graph_task_id() != -1
