"""Copy what several tensors hold to the host at once: each copy makes a GPU and its host wait for one another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["to_host"]


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return copies on the CPU that share nothing with the tensors, made by one transfer.

    Args:
        tensors: All on one device.

    Example:
        >>> numbers, flags = to_host([torch.ones(1, 2), torch.tensor([True, False])])
        >>> numbers, flags
        (tensor([[1., 1.]]), tensor([ True, False]))
    """
    if not tensors:
        return []
    packed = torch.cat([tensor.detach().flatten() for tensor in tensors]).cpu()  # in the widest of their types
    parts = packed.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)]
