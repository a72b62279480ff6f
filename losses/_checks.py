"""Checks that every loss shares, in one voice: what was expected, what came, what to do."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["REDUCTIONS", "accumulation_dtype", "check_shape", "check_weight_values", "check_within", "one_of"]

Value = TypeVar("Value")

REDUCTIONS = ("none", "mean", "sum")


def one_of(name: str, value: Value, allowed: Collection[Value]) -> Value:
    """Return ``value`` if it is among ``allowed``."""
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, allowed))}, got {value!r}.")
    return value


def check_shape(name: str, tensor: Tensor, expected: Sequence[int], axes: str) -> None:
    """Raise unless ``tensor`` is a tensor of the shape ``expected``, whose axes are called ``axes``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"`{name}` must be a tensor of shape {axes} = {tuple(expected)}, got {type(tensor).__name__}.")
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"`{name}` must have shape {axes} = {tuple(expected)}, got {tuple(tensor.shape)}.")


def check_within(name: str, tensor: Tensor, low: float, high: float, skip: int | None = None) -> None:
    """Raise if a value lies outside ``[low, high]``, or is NaN, and is not ``skip``.

    Looks at values on the CPU only: on an accelerator it would make every step wait for the device, and while compiling
    it would break the graph.
    """
    if tensor.device.type != "cpu" or torch.compiler.is_compiling() or tensor.numel() == 0:
        return
    bad = ~((tensor >= low) & (tensor <= high))
    if skip is not None:
        bad &= tensor != skip
    if bool(bad.any()):
        raise ValueError(f"`{name}` must lie between {low} and {high}, got {tensor[bad][0].item()}.")


def check_weight_values(name: str, weight: Tensor) -> None:
    """Raise unless every weight is finite and not negative. Waits for the device: call it at set time only."""
    bad = ~(torch.isfinite(weight) & (weight >= 0))
    if bool(bad.any()):
        raise ValueError(f"`{name}` must be finite and not negative, got {weight[bad][0].item()}.")


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """Return float32 for half precision, else the tensor's own floating dtype."""
    return torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype
