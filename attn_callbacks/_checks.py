"""Argument and shape checks, one voice: what was expected, what came, what to do."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from numbers import Real
from typing import TypeVar

__all__ = ["at_least", "check_axes", "check_number", "in_range", "integer", "name_list", "one_of"]

Value = TypeVar("Value")


def integer(name: str, value: int) -> int:
    """Return ``value`` if it is an integer; a boolean is none."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an integer, got {value!r}.")
    return value


def at_least(name: str, value: int, low: int) -> int:
    """Return ``value`` if it is an integer of at least ``low``."""
    if integer(name, value) < low:
        raise ValueError(f"`{name}` must be at least {low}, got {value}.")
    return value


def check_number(name: str, value: object) -> None:
    """Raise unless ``value`` is a real number; a boolean is none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{name}` must be a number, got {value!r}.")


def in_range(name: str, value: float, low: float, high: float) -> float:
    """Return ``value`` if it lies in ``[low, high]``; NaN does not."""
    check_number(name, value)
    if not low <= value <= high:
        raise ValueError(f"`{name}` must lie between {low} and {high}, got {value}.")
    return value


def one_of(name: str, value: Value, allowed: Collection[Value]) -> Value:
    """Return ``value`` if it is among ``allowed``."""
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, allowed))}, got {value!r}.")
    return value


def check_axes(name: str, array: object, axes: int) -> None:
    """Raise unless ``array`` has ``axes`` axes."""
    shape = tuple(getattr(array, "shape", ()))
    if len(shape) != axes:
        raise ValueError(f"`{name}` must have {axes} axes, got shape {shape}.")


def name_list(name: str, value: Sequence[str]) -> tuple[str, ...]:
    """Return ``value`` as a tuple if it is a list of names; a single string is a list of letters by accident."""
    if isinstance(value, str):
        raise TypeError(f"`{name}` must be a list of names, got {value!r}. Pass [{value!r}].")
    return tuple(value)
