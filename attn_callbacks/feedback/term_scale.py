"""The size of a loss term beside the loss it is added to."""

from __future__ import annotations

import torch
from torch import Tensor, distributed

__all__ = ["averaged", "scale"]

_MEMORY = 0.99  # share of the old averages in the new ones: about the last hundred steps
_LARGEST_SCALE = 100.0


@torch.no_grad()
def averaged(averages: Tensor | None, base: Tensor, term: Tensor, annotated: Tensor) -> Tensor:
    """Take a step's losses into running averages, over all processes; every process has to call it at every step.

    Losses that are not finite leave the averages alone, and so does the term of a step without annotation.

    Args:
        averages: What it returned before; ``None`` at the first step.
        base: Loss without the term.
        term: The term, with the factor 1.
        annotated: ``True`` if the step had annotated samples.

    Shape:
        - averages, output: ``(2,)``: of the loss and of the term; NaN before the first
        - base, term, annotated: scalar
    """
    values = torch.stack([base.detach().float(), term.detach().float()])
    known = values.isfinite() & torch.stack([torch.ones_like(annotated), annotated])
    sums = torch.stack([values.where(known, 0.0), known.float()])
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(sums)
    mean = sums[0] / sums[1]
    old = mean if averages is None else averages.to(mean.device)
    moved = torch.where(old.isnan(), mean, _MEMORY * old + (1 - _MEMORY) * mean)
    return moved.where(sums[1] > 0, old)


def scale(averages: Tensor) -> Tensor:
    """Return the factor that gives the term the size of the loss, between 1/100 and 100; a scalar.

    Args:
        averages: What :func:`averaged` returned.
    """
    base, term = averages.unbind()
    ratio = base / term.clamp(min=torch.finfo(term.dtype).tiny)
    return ratio.nan_to_num(1.0).clamp(1 / _LARGEST_SCALE, _LARGEST_SCALE)
