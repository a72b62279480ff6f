"""What chance explains: p-values of a normal test, and their correction for many comparisons."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["holm", "normal_p"]


def normal_p(deviation: Tensor, *, two_sided: bool = True) -> Tensor:
    r"""Return how probable a deviation of so many standard errors is by chance.

    Args:
        deviation: Size over standard error; NaN stays NaN.
        two_sided: Count deviations to either side; else those above alone.

    Example:
        >>> normal_p(torch.tensor([1.96, -1.96]))
        tensor([0.0500, 0.0500], dtype=torch.float64)
        >>> normal_p(torch.tensor([1.96, -1.96]), two_sided=False)
        tensor([0.0250, 0.9750], dtype=torch.float64)
    """
    distance = deviation.double() / math.sqrt(2)
    chance: Tensor = torch.special.erfc(distance.abs()) if two_sided else torch.special.erfc(distance) / 2
    return chance


def holm(p_values: Tensor, comparisons: int = 0) -> Tensor:
    """Correct p-values for their number, so that no more than the level's share of *reports* has a false finding.

    Steps down from the smallest: as strict as Bonferroni for the first, less so for each that follows. Comparisons may
    depend on each other in any way.

    Args:
        p_values: One for each comparison, of any shape; NaN where none was made. It stays NaN and does not count.
        comparisons: How many were made in all, where ``p_values`` holds only the smallest of them; 0: those given.

    Example:
        >>> holm(torch.tensor([0.01, 0.04, 0.03]))
        tensor([0.0300, 0.0600, 0.0600], dtype=torch.float64)

    References:
        Holm, "A Simple Sequentially Rejective Multiple Test Procedure", 1979.
    """
    values = p_values.double().flatten()
    order = values.argsort(stable=True)  # NaN comes last
    made = max(int((~values.isnan()).sum()), comparisons)
    left = (made - torch.arange(len(values), dtype=torch.float64)).clamp(min=1)
    stepped = values.new_empty(len(values))
    if len(values):
        stepped[order] = (values[order] * left).nan_to_num(nan=math.inf).cummax(dim=0).values.clamp(max=1)
    return stepped.where(~values.isnan(), torch.nan).reshape(p_values.shape)
