"""Copy, pickle and print a callback by its constructor arguments."""

from __future__ import annotations

import inspect
from typing import Any

__all__ = ["ArgumentsOnly"]


class ArgumentsOnly:
    """For classes that keep each constructor argument under its own name and need none.

    A pickled copy (``ddp_spawn``, notebooks) starts anew: what belongs to a run (recorders, generators, pictures) stays
    behind.
    """

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __repr__(self) -> str:
        given, usual = self.__getstate__(), type(self)().__getstate__()
        changed = (f"{name}={value!r}" for name, value in given.items() if value != usual[name])
        return f"{type(self).__name__}({', '.join(changed)})"
