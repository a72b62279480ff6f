"""Checks that every loss shares, in one voice: what was expected, what came, what to do."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Sequence
from typing import TypeVar

import torch
from torch import Tensor

__all__ = [
    "REDUCTIONS",
    "ROUNDING",
    "accumulation_dtype",
    "at_least",
    "check_shape",
    "check_tensor",
    "check_weight_values",
    "check_weights",
    "check_within",
    "class_counts_tensor",
    "in_range",
    "one_of",
]

Value = TypeVar("Value")

REDUCTIONS = ("none", "mean", "sum")
_LARGEST = torch.finfo(torch.float16).max  # a limit beyond is none to speak of
ROUNDING = 1e-3  # how far a share, such as an average of shares, may miss [0, 1]; half precision rounds so


def one_of(name: str, value: Value, allowed: Collection[Value]) -> Value:
    """Return ``value`` if it is among ``allowed``."""
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, allowed))}, got {value!r}.")
    return value


def at_least(name: str, value: int, low: int) -> int:
    """Return ``value`` if it is a whole number not below ``low``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"`{name}` must be a whole number, got {value!r}.")
    if value < low:
        raise ValueError(f"`{name}` must be at least {low}, got {value}.")
    return int(value)


def in_range(name: str, value: float, low: float, high: float = math.inf, *, above: bool = False) -> float:
    """Return ``value`` if it is a finite number in ``[low, high]``, or with ``above`` in ``(low, high]``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`{name}` must be a number, got {value!r}.")
    # a compiler cannot trace `math.isfinite`
    if not (low <= value <= high and value != math.inf) or (above and value == low):
        lower = f"above {low}" if above else f"at least {low}"
        limits = lower if math.isinf(high) else f"above {low}, up to {high}" if above else f"between {low} and {high}"
        raise ValueError(f"`{name}` must be a finite number, {limits}, got {value}.")
    return value if isinstance(value, int | float) else float(value)


def check_tensor(name: str, value: object, advice: str = "") -> None:
    """Raise unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` must be a tensor, got {type(value).__name__}. {advice}".rstrip())


def check_shape(name: str, tensor: Tensor, expected: Sequence[int], axes: str) -> None:
    """Raise unless ``tensor`` is a tensor of the shape ``expected``, whose axes are called ``axes``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"`{name}` must be a tensor of shape {axes} = {tuple(expected)}, got {type(tensor).__name__}.")
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"`{name}` must have shape {axes} = {tuple(expected)}, got {tuple(tensor.shape)}.")


def check_within(
    name: str,
    tensor: Tensor,
    low: float,
    high: float,
    skip: int | None = None,
    advice: str = "",
    slack: float = 0.0,
) -> None:
    """Raise if a value lies outside ``[low, high]``, or is NaN, and is not ``skip``; ``advice`` says what to do then.

    What misses the interval by up to ``slack`` passes: sums of shares round.

    Looks at values on the CPU only: on an accelerator it would make every step wait for the device, while compiling it
    would break the graph, and inside a transform of ``torch.func`` there are no values to look at.
    """
    if tensor.device.type != "cpu" or torch.compiler.is_compiling() or tensor.numel() == 0:
        return
    bad = ~((tensor >= low - slack) & (tensor <= high + slack))
    if skip is not None:
        bad &= tensor != skip
    if _any(bad):
        limits = f"be at least {low}" if high >= _LARGEST > -low else f"lie between {low} and {high}"
        raise ValueError(f"`{name}` must {limits}, got {tensor[bad][0].item()}. {advice}".rstrip())


def check_weights(name: str, weight: Tensor) -> None:
    """Raise if a weight is negative, infinite or NaN; looks at the CPU only, as :func:`check_within`."""
    largest = torch.finfo(torch.float16 if weight.dtype == torch.float16 else torch.float32).max
    check_within(name, weight.detach(), 0, largest, advice="Weights are finite and not negative; zero leaves out.")


def check_weight_values(name: str, weight: Tensor) -> None:
    """Raise unless every weight is finite and not negative. Waits for the device: call it at set time only."""
    bad = ~(torch.isfinite(weight) & (weight >= 0))
    if bool(bad.any()):
        raise ValueError(f"`{name}` must be finite and not negative, got {weight[bad][0].item()}.")


def class_counts_tensor(class_counts: Tensor | Sequence[float]) -> Tensor:
    """Return the number of training samples of each class as float64 ``(classes,)``, after checking it."""
    counts = torch.as_tensor(class_counts, dtype=torch.float64)
    if counts.dim() != 1 or len(counts) < 1:
        raise ValueError(f"`class_counts` must have shape (classes,), got {tuple(counts.shape)}.")
    check_weight_values("class_counts", counts)
    if not bool((counts > 0).any()):
        raise ValueError("`class_counts` must have a class with samples, got zeros only. Count the training labels.")
    return counts


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """Return float32 for half precision, else the tensor's own floating dtype."""
    return torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype


def _any(bad: Tensor) -> bool:
    """Return whether any value is bad; not told inside ``torch.func.vmap``, where values cannot be read."""
    try:
        return bool(bad.any())
    except RuntimeError:
        return False
