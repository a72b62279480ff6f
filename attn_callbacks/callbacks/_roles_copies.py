"""What tells samples from one another, and copies to the host bit by bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attn_callbacks.callbacks._host import to_host

__all__ = ["bits_to_host", "sample_marks"]

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_GOLDEN = -7046029254386353131
_ROUNDS = (30, -4658895280553007687), (27, -7723592293110705685)  # of the generator `splitmix64`


def sample_marks(inputs: Tensor) -> Tensor:
    """Return a number for each sample that another value, bit or order in it changes; NaN is a value like others.

    Sum of the bit patterns, each times a random number of its place; the products overflow on purpose. Waits for no
    device.

    Shape:
        - inputs: ``(samples, ...)``
        - output: int64 ``(samples,)``
    """
    flat = (inputs.flatten(1) if inputs.dim() > 1 else inputs[:, None]).detach().contiguous()
    bits = flat.view(_BITS.get(flat.element_size(), torch.int64)).long()
    place = torch.arange(1, bits.shape[1] + 1, device=bits.device) * _GOLDEN
    for shift, factor in _ROUNDS:
        place = (place ^ (place >> shift)) * factor
    return ((bits ^ (bits >> 32)) * (place ^ (place >> 31))).sum(
        dim=1
    )  # a float64 may have nothing but zeros in its lower half


def bits_to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return copies on the CPU of tensors of any kind, by one transfer a device; also for use outside inference mode.

    Args:
        tensors: In any order, on any devices.
    """
    found: dict[int, Tensor] = {}
    with torch.inference_mode(False), torch.no_grad():
        for device in dict.fromkeys(tensor.device for tensor in tensors):
            own = [number for number, tensor in enumerate(tensors) if tensor.device == device]
            own.sort(key=lambda number: -tensors[number].element_size())  # each begins at a multiple of its own size
            packed = to_host([tensors[number].contiguous().flatten().view(torch.uint8) for number in own])
            found.update(zip(own, packed, strict=True))
        return [found[number].view(each.dtype).view(each.shape) for number, each in enumerate(tensors)]
