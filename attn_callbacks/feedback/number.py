"""A check that what was given is a number at all, before it is compared with anything."""

from __future__ import annotations

from numbers import Real

__all__ = ["check_number"]


def check_number(name: str, value: object) -> None:
    """Raise unless ``value`` is a real number; a boolean is none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{name}` must be a number, got {value!r}.")
