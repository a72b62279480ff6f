"""How the tensors of a report are held: copies on the CPU, in one type, of the shapes that were promised."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["check_axes_of", "hold"]


def hold(owner: object, name: str, dtype: torch.dtype) -> None:
    """Replace a tensor of a frozen dataclass by a copy of its own; the accumulator it came from goes on counting.

    Args:
        owner: The dataclass.
        name: Its field; ``None`` stays ``None``.
        dtype: Type to hold it in.
    """
    tensor: Tensor | None = getattr(owner, name)
    if tensor is not None:
        object.__setattr__(owner, name, tensor.detach().to("cpu", dtype, copy=True))


def check_axes_of(name: str, tensor: Tensor, axes: Sequence[str | int]) -> None:
    """Raise unless a tensor has the axes that are named; a number is a size.

    Args:
        name: Name in the message.
        tensor: The tensor.
        axes: Name or size of each axis.

    Raises:
        ValueError: If the number of axes, or one of the sizes, is another.
    """
    shape = tuple(tensor.shape)
    fits = len(shape) == len(axes) and all(
        isinstance(axis, str) or axis == size for axis, size in zip(axes, shape, strict=True)
    )
    if not fits:
        comma = "," if len(axes) == 1 else ""
        raise ValueError(f"`{name}` must have shape ({', '.join(map(str, axes))}{comma}), got {shape}.")
