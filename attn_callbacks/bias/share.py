"""Attention that each class pays to a set of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attn_callbacks.bias.rates import rate_error

__all__ = ["AttentionShare"]


@dataclass(frozen=True, eq=False)
class AttentionShare:
    """Attention on a token set, class by class; held in float64 on the CPU.

    Mass is not reliance: a model may look at a token and not use it. Mask the set and measure the drop as well.

    Args:
        mass: Mean attention mass on the set; NaN for a class without samples.
        lift: Mass over the set's share of the tokens: 1 is chance.
        support: Number of samples that hold a token of the set.

    Shape:
        - mass, lift, support: ``(classes,)``

    Raises:
        ValueError: If the shapes differ or have more than one axis.

    Example:
        >>> share = AttentionShare(torch.tensor([0.3, 0.1]), torch.tensor([3.0, 1.0]), torch.tensor([50, 40]))
        >>> share.chance
        tensor([0.1000, 0.1000], dtype=torch.float64)
    """

    mass: Tensor
    lift: Tensor
    support: Tensor

    def __post_init__(self) -> None:
        shapes = [tuple(values.shape) for values in (self.mass, self.lift, self.support)]
        if len(set(shapes)) > 1 or len(shapes[0]) != 1:
            raise ValueError(f"`mass`, `lift` and `support` must all have shape (classes,), got {shapes}.")
        for name, dtype in (("mass", torch.float64), ("lift", torch.float64), ("support", torch.int64)):
            # a copy: the accumulator it came from goes on counting
            object.__setattr__(self, name, getattr(self, name).detach().to("cpu", dtype, copy=True))

    @property
    def chance(self) -> Tensor:
        """Mass under uniform attention, ``(classes,)``; NaN where no mass was seen."""
        return self.mass / self.lift

    @property
    def mass_error(self) -> Tensor:
        """Standard error of :attr:`mass` at most, ``(classes,)``: masses spread less than hits and misses."""
        return rate_error(self.mass, self.support)

    def to_dict(self) -> dict[str, Tensor]:
        """Return the three tensors by name."""
        return {"mass": self.mass, "lift": self.lift, "support": self.support}
