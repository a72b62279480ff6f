"""Numbers wide enough to compute with: float32 at least, whatever a model runs in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

__all__ = ["full_precision", "wide"]


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Keep autocast from turning products of float32 into half precision, on devices that have it."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor without a graph, in float32 or wider."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
