"""What recorders change for the whole process: entered by the first that needs it, left by the last."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

__all__ = ["Shared", "replaced"]


class Shared:
    """A context that several users hold at once, whatever the order in which they come and go.

    Saving and restoring by each user alone would leave a change behind when two threads overlap: the first to leave
    restores the original, the last one what the first had put there.

    Args:
        make: Builds the context for the first user.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[Any]]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._users = 0
        self._context: AbstractContextManager[Any] | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the context entered for the length of a ``with`` block."""
        with self._lock:
            if self._context is None:
                context = self._make()
                context.__enter__()
                self._context = context
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0 and self._context is not None:
                    context, self._context = self._context, None
                    context.__exit__(None, None, None)


@contextmanager
def replaced(owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Put ``wrap(original)`` in the place of the function ``owner.name`` for the length of a ``with`` block."""
    original = getattr(owner, name)
    setattr(owner, name, wrap(original))
    try:
        yield
    finally:
        setattr(owner, name, original)
