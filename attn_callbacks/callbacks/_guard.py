"""A block that no error leaves: whatever only looks at training must not end it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from attn_callbacks._lightning import rank_zero_warn

__all__ = ["Guard", "message", "told"]


class Guard:
    """Keep errors inside its block; the first one is told in a warning and switches its owner off.

    Args:
        owner: What is switched off, for the warning.

    Example:
        >>> guard = Guard("Example")
        >>> guard.off
        False
    """

    def __init__(self, owner: str) -> None:
        self.off = False
        self._owner = owner
        self._first = ""

    @property
    def cause(self) -> str | None:
        """What switched the owner off, for other processes to be told; ``None`` while it is on."""
        return (self._first or "It was switched off before.") if self.off else None

    @contextmanager
    def block(self) -> Iterator[None]:
        """Keep errors inside."""
        try:
            yield
        except Exception as error:  # noqa: BLE001
            if not self.off:
                self.off, self._first = True, told(error)
                rank_zero_warn(f"{self._owner} is switched off for the rest of this run. {self._first}")


def told(error: Exception) -> str:
    """Return the kind of an error and what it says."""
    return f"{type(error).__name__}: {message(error)}"


def message(error: Exception) -> str:
    """Return what an error says; ``str`` of a KeyError is its repr."""
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
