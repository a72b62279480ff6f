"""How often each class is seen, also by group: the prior that losses correct for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from losses._checks import class_counts_tensor
from losses.classification._base import shown_counts

__all__ = ["Counts", "checked_counts", "log_prior", "shown_table"]

Counts = Tensor | Sequence[float] | Sequence[Sequence[float]]


def log_prior(class_counts: Counts) -> Tensor:
    r"""Return :math:`\log \pi_c = \log (n_c / \sum_k n_k)`, the log of each class's share of the samples, in nats.

    A class without samples counts as one sample, the fewest that can be seen, or as the rarest class where counts are
    shares below one. It changes no other class. Counts by group give the shares within each group; those of a group
    without samples are not known, and its row is zero: all classes alike.

    Args:
        class_counts: Number of training samples of each class, or of each class in each group, or its share.

    Shape:
        - class_counts, output: ``(classes,)`` or ``(groups, classes)``

    Raises:
        ValueError: If a count is negative or not finite, or all are zero.

    Example:
        >>> log_prior([90, 9, 1])
        tensor([-0.1054, -2.4079, -4.6052])
    """
    counts = checked_counts(class_counts)
    there = counts > 0
    fewest = counts.masked_fill(~there, torch.inf).amin(dim=-1, keepdim=True).clamp(max=1)
    logs = (torch.where(there, counts, fewest) / counts.sum(dim=-1, keepdim=True)).log()
    return logs.where(there.any(dim=-1, keepdim=True), 0.0).to(torch.get_default_dtype())


def checked_counts(class_counts: Counts) -> Tensor:
    """Return the counts as float64 in their shape, after checking them."""
    counts = torch.as_tensor(class_counts, dtype=torch.float64)
    if counts.dim() != 2:
        return class_counts_tensor(counts)
    return class_counts_tensor(counts.flatten()).reshape(counts.shape)


def shown_table(counts: Sequence[Any]) -> str:
    """Write counts, by class or by group and class, so that a loss prints as it was built."""
    if not isinstance(counts[0], list):
        return shown_counts(counts)
    shown = [shown_counts(row) for row in counts]
    return f"[{', '.join(shown if len(shown) <= 8 else [*shown[:7], '...'])}]"
