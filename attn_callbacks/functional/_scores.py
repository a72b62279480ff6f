"""How well attention fits a pattern: what it scores, what chance scores, and for how much of the data."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["PatternScores"]

_TELLING = 0.9  # what expects more of the pairs than this says next to nothing about a head


class PatternScores(NamedTuple):
    """How well attention fits patterns; fields have the same shape, ``(batch, heads, patterns)`` as a rule.

    Args:
        score: Mean attention mass on the keys that the pattern expects, over rows for which it expects any.
        chance: The same for attention that is uniform over the allowed keys.
        coverage: Share of the rows that count for which the pattern expects any key.

    Example:
        >>> PatternScores(torch.tensor(0.875), torch.tensor(0.75), torch.tensor(1.0)).strength()
        tensor(0.5000)
    """

    score: Tensor
    chance: Tensor
    coverage: Tensor

    def strength(self) -> Tensor:
        """Return the score corrected for chance, ``(score - chance) / (1 - chance)``.

        It is 0 for uniform attention, under a causal mask too, and 1 for a head that does nothing else. Rows that can
        attend to expected keys only, such as the first row of a causal map, do not move it. NaN where the pattern is
        undefined or expects more than 0.9 of what uniform attention gives anyway.
        """
        telling = self.chance <= _TELLING
        return ((self.score - self.chance) / (1 - self.chance)).masked_fill(~telling, torch.nan)
