"""Give samples the values of other samples at marked positions."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["moved", "shuffle_region", "with_features"]


def shuffle_region(
    inputs: Tensor, mask: Tensor, givers: Tensor | None = None, *, generator: torch.Generator | None = None
) -> Tensor:
    """Replace marked values by those of another sample at the same positions.

    The other sample is the next one on a random round trip through the batch, so that values stay plausible, belong
    together, and every sample gives once and takes once. Where that sample may not give, the next one on the trip that
    may steps in; where there is none, the own value stays.

    Args:
        inputs: Token ids, features or pictures.
        mask: ``True`` where values are replaced.
        givers: ``True`` where a value may be taken, such as ``False`` on padding; ``None``: everywhere.
        generator: Source of the random numbers, on the CPU; ``None`` takes torch's global one.

    Shape:
        - inputs: ``(samples, tokens)``, ``(samples, tokens, features)`` or ``(samples, channels, height, width)``
        - mask, givers: that shape, or that shape without features or channels
        - output: the shape, dtype and device of ``inputs``

    Example:
        >>> tokens = torch.tensor([[1, 2, 3], [4, 5, 0]])
        >>> shuffle_region(tokens, torch.tensor([[True, False, True], [False, True, False]]), tokens != 0)
        tensor([[4, 2, 3],
                [4, 2, 0]])
    """
    if inputs.numel() == 0:
        return inputs
    order = moved(torch.randperm(len(inputs), generator=generator), inputs.device)
    back = order.argsort()  # place of each sample on the trip
    values = inputs.detach()
    if givers is None:
        other = values[order.roll(-1)[back]]
    else:
        mask = mask & givers.any(dim=0)
        donor = order[_next_giver(givers[order])][back]  # (samples, positions...)
        other = values.gather(0, with_features(donor, inputs).expand_as(inputs))
    return torch.where(with_features(mask, inputs), other, inputs)


def with_features(mask: Tensor, inputs: Tensor) -> Tensor:
    """Return a mask with an axis of size one where ``inputs`` have features (the last) or channels (the second)."""
    return mask if mask.dim() == inputs.dim() else mask.unsqueeze(1 if inputs.dim() > 3 else -1)


def moved(values: Tensor, device: torch.device) -> Tensor:
    """Return numbers that were drawn on the CPU on a device, without waiting for it.

    Args:
        values: On the CPU.
        device: Where they are wanted.
    """
    # copies from memory that is not pinned wait until a GPU has done all it was given before
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def _next_giver(givers: Tensor) -> Tensor:
    """Return for each row the row after it, round about, that gives at the same position.

    Shape:
        - givers, output: ``(rows, positions...)``; columns without any giver hold row 0
    """
    rows = len(givers)
    twice = torch.arange(2 * rows, device=givers.device).reshape(-1, *[1] * (givers.dim() - 1))
    at = torch.where(torch.cat([givers, givers]), twice, 2 * rows)
    at_or_after = at.flip(0).cummin(dim=0).values.flip(0)
    return at_or_after[1 : rows + 1] % rows
