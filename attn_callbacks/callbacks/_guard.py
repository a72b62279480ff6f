"""A block that no error leaves: whatever only looks at training must not end it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from attn_callbacks._lightning import rank_zero_warn

__all__ = ["Guard", "message"]


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

    @contextmanager
    def block(self) -> Iterator[None]:
        """Keep errors inside."""
        try:
            yield
        except Exception as error:  # noqa: BLE001
            if not self.off:
                self.off = True
                kind = type(error).__name__
                rank_zero_warn(f"{self._owner} is switched off for the rest of this run. {kind}: {message(error)}")


def message(error: Exception) -> str:
    """Return what an error says; ``str`` of a KeyError is its repr."""
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
