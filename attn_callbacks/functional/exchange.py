"""Exchange what a region of the inputs holds between samples, so that it no longer says anything about its sample."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["RegionContents", "join_contents", "paste_region", "region_contents"]


class RegionContents(NamedTuple):
    """What the region of each sample holds, in reading order.

    Args:
        values: ``(samples, longest, features)``; after its own length, a sample has zeros.
        lengths: Number of places in the region of each sample, ``(samples,)``.
    """

    values: Tensor
    lengths: Tensor


def region_contents(inputs: Tensor, mask: Tensor) -> RegionContents:
    """Take out what a region holds.

    Args:
        inputs: Token ids, features of tokens, or pictures.
        mask: ``True`` in the region.

    Shape:
        - inputs: ``(samples, tokens)``, ``(samples, tokens, features)`` or ``(samples, channels, height, width)``
        - mask: that shape without features or channels

    Raises:
        ValueError: If the mask does not lie on the inputs.

    Example:
        >>> contents = region_contents(torch.tensor([[5, 6, 7], [8, 9, 4]]), torch.tensor([[1, 0, 1], [0, 1, 0]]))
        >>> contents.values[..., 0].tolist(), contents.lengths.tolist()
        ([[5, 7], [9, 0]], [2, 1])
    """
    values, chosen = _places(inputs), _chosen(inputs, mask)
    lengths = chosen.sum(dim=1)
    longest = max(int(lengths.max()), 1) if len(lengths) else 1
    order = chosen.long().argsort(dim=1, descending=True, stable=True)[:, :longest]
    taken = values.gather(1, order[..., None].expand(-1, -1, values.shape[2]))
    beyond = torch.arange(order.shape[1], device=order.device) >= lengths[:, None]
    return RegionContents(taken.masked_fill(beyond[..., None], 0), lengths)


def join_contents(parts: list[RegionContents]) -> RegionContents:
    """Put the contents of several batches together, padded to the longest.

    Args:
        parts: Contents of regions with the same features; at least one.

    Example:
        >>> part = region_contents(torch.tensor([[5, 6]]), torch.tensor([[True, True]]))
        >>> other = region_contents(torch.tensor([[8, 9, 4]]), torch.ones(1, 3))
        >>> join_contents([part, other]).values[..., 0].tolist()
        [[5, 6, 0], [8, 9, 4]]
    """
    longest = max(part.values.shape[1] for part in parts)
    padded = [torch.nn.functional.pad(part.values, (0, 0, 0, longest - part.values.shape[1])) for part in parts]
    return RegionContents(torch.cat(padded), torch.cat([part.lengths for part in parts]))


def paste_region(inputs: Tensor, mask: Tensor, contents: RegionContents, donor: Tensor) -> Tensor:
    """Fill the region of each sample with what the region of another one holds, in reading order.

    Contents that are too short begin again from their start, so that nothing foreign to regions gets in; a donor
    without a region leaves its sample as it is.

    Args:
        inputs: Token ids, features of tokens, or pictures.
        mask: ``True`` in the region.
        contents: What regions hold.
        donor: Index of the contents that each sample takes.

    Shape:
        - inputs, mask: as for :func:`region_contents`
        - donor: ``(samples,)``
        - output: the shape of ``inputs``

    Example:
        >>> inputs, mask = torch.tensor([[5, 6, 7], [8, 9, 4]]), torch.tensor([[1, 0, 1], [0, 1, 0]])
        >>> paste_region(inputs, mask, region_contents(inputs, mask), donor=torch.tensor([1, 0]))
        tensor([[9, 6, 9],
                [8, 5, 4]])
    """
    values, chosen = _places(inputs), _chosen(inputs, mask)
    lengths = contents.lengths[donor]
    place = (chosen.cumsum(dim=1) - 1).clamp(min=0) % lengths.clamp(min=1)[:, None]  # (samples, places)
    taken = contents.values[donor].gather(1, place[..., None].expand(-1, -1, values.shape[2]))
    filled = taken.to(values.dtype).where((chosen & (lengths > 0)[:, None])[..., None], values)
    return filled.mT.reshape(inputs.shape) if inputs.dim() == 4 else filled.reshape(inputs.shape)


def _places(inputs: Tensor) -> Tensor:
    """Return ``(samples, places, features)``."""
    if inputs.dim() == 2:
        return inputs[..., None]
    return inputs.flatten(2).mT if inputs.dim() == 4 else inputs


def _chosen(inputs: Tensor, mask: Tensor) -> Tensor:
    expected = (inputs.shape[0], *inputs.shape[2:]) if inputs.dim() == 4 else tuple(inputs.shape[:2])
    if tuple(mask.shape) != expected:
        raise ValueError(f"`mask` must have shape {expected}, `inputs` without its features, got {tuple(mask.shape)}.")
    return mask.bool().flatten(1)
