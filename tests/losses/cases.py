"""What a battery needs to know about a loss module: how to build it, how to call it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Case(NamedTuple):
    """One public module and arguments for it.

    Args:
        build: Returns a new module, the same one every time.
        arguments: Returns new positional and keyword arguments of a call; drawn with torch's global generator, so that
            the same seed gives the same arguments. Floating tensors that the loss differentiates require a gradient.
        empty: Returns arguments with which nothing counts (everything ignored, masked or not annotated), so that the
            loss must be a finite zero with a gradient; ``None`` if there is no such thing for this module.
        compiles: The module compiles without a graph break; else the reason is the value.
        half: The module takes inputs in half precision; else the reason is the value.
        gpu: A GPU gives what the CPU gives; else the reason is the value, such as noise drawn on the device.
    """

    build: Callable[[], nn.Module]
    arguments: Callable[[], Arguments]
    empty: Callable[[], Arguments] | None = None
    compiles: bool | str = True
    half: bool | str = True
    gpu: bool | str = True
