"""Exchange what stands at marked places between samples."""

from __future__ import annotations

import torch
from torch import Tensor

import losses
from benchmarks.debias.work import Work

__all__ = ["exchanged", "marked_elsewhere"]


def exchanged(work: Work, inputs: Tensor, mask: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return the inputs with marked values from other samples of the batch, at the same places.

    Args:
        work: Says who gives (``donor``) and which token ids stay where they are.
        inputs: Token ids, features or pictures.
        mask: True where a value is replaced, as :func:`benchmarks.debias.work.region` returns it.
        generator: Source of the random numbers.
    """
    if work.donor == "marked":
        return marked_elsewhere(inputs, mask.expand_as(inputs) if inputs.ndim == 4 else mask, generator)
    protected = () if inputs.is_floating_point() else work.protected
    full = mask.expand_as(inputs) if inputs.ndim == 4 else mask
    return losses.randomize_masked(inputs, full, protected=protected, generator=generator)


def marked_elsewhere(inputs: Tensor, mask: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Replace each marked value by that of the next sample, on a random round trip, that is marked there too.

    So nothing that was not marked gets in: no ink of another digit among the background.

    Shape:
        - inputs, mask, output: equal; or the mask without the features of ``inputs``
    """
    if mask.ndim < inputs.ndim:
        mask = mask[..., None].expand_as(inputs)
    trip = torch.randperm(len(inputs), generator=generator)
    values, marked, rows = inputs[trip], mask[trip].bool(), len(inputs)
    turns = torch.arange(2 * rows).reshape(-1, *[1] * (inputs.ndim - 1))
    at = torch.where(torch.cat([marked, marked]), turns, 2 * rows)
    next_marked = at.flip(0).cummin(dim=0).values.flip(0)[1 : rows + 1] % rows
    given = torch.where(marked, values.gather(0, next_marked), values)
    return given[trip.argsort()]
