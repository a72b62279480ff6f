"""Copy, pickle and print a callback by its constructor arguments."""

from __future__ import annotations

import inspect
from typing import Any

__all__ = ["ArgumentsOnly"]


class ArgumentsOnly:
    """For classes that keep each constructor argument under its own name.

    A pickled copy (``ddp_spawn``, notebooks) starts anew: what belongs to a run (recorders, generators, pictures) stays
    behind.
    """

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _defaults(type(self))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __repr__(self) -> str:
        given = {name: getattr(self, name) for name, default in _defaults(type(self)).items()}
        changed = (f"{k}={v!r}" for k, v in given.items() if not _same(v, _defaults(type(self))[k]))
        return f"{type(self).__name__}({', '.join(changed)})"


def _defaults(kind: type) -> dict[str, Any]:
    parameters = inspect.signature(kind).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters}


def _same(value: Any, default: Any) -> bool:
    return value is default or (type(value) is type(default) and bool(value == default))
