"""How far groups give classes away in training data, before anything is trained on them."""

from __future__ import annotations

from torch import Tensor

__all__ = ["cramers_v"]


def cramers_v(counts: Tensor, minimum: int = 1) -> float:
    r"""Return Cramér's V of a table, corrected for chance: 0 for independence, 1 where a group says which class it is.

    .. math::
        \tilde V = \sqrt{\max\bigl(0, \phi^2 - \tfrac{(r - 1)(c - 1)}{n - 1}\bigr) / \min(\tilde r - 1, \tilde c - 1)},
        \qquad \phi^2 = \chi^2 / n, \quad \tilde r = r - \tfrac{(r - 1)^2}{n - 1}

    Args:
        counts: Samples of each group and class, ``(groups, classes)``.
        minimum: Least number of samples of a group, or of a class, that counts.

    Example:
        >>> import torch
        >>> round(cramers_v(torch.tensor([[95, 5], [5, 95]])), 2), cramers_v(torch.tensor([[90, 10], [9, 1]]))
        (0.9, 0.0)

    References:
        Bergsma, "A bias-correction for Cramér's V and Tschuprow's T", Journal of the Korean Statistical Society, 2013.
    """
    table = counts.double()
    table = table[table.sum(dim=1) >= minimum][:, table.sum(dim=0) >= minimum]
    table = table[table.sum(dim=1) > 0][:, table.sum(dim=0) > 0]
    total, (rows, columns) = float(table.sum()), table.shape
    if rows < 2 or columns < 2:
        return 0.0
    expected = table.sum(dim=1, keepdim=True) * table.sum(dim=0, keepdim=True) / total
    phi_square = float(((table - expected).square() / expected).sum()) / total
    beyond_chance = max(0.0, phi_square - (rows - 1) * (columns - 1) / (total - 1))
    least = min(size - (size - 1) ** 2 / (total - 1) for size in (rows, columns))
    return min(1.0, (beyond_chance / (least - 1)) ** 0.5) if least > 1 else 0.0
