"""Attention that each class pays to a set of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attn_callbacks._plain import plain
from attn_callbacks.bias._held import check_axes_of, hold
from attn_callbacks.bias.rates import rate_error

__all__ = ["AttentionShare"]

_MEASURED = ("mass", "lift", "support", "error", "share")
_BY_OUTCOME = ("outcome_mass", "outcome_support", "outcome_error")


@dataclass(frozen=True, eq=False)
class AttentionShare:
    """Attention on a token set, class by class; held in float64 on the CPU.

    Mass is not reliance: a model may look at a token and not use it. :class:`Reliance` measures the drop as well.

    Args:
        mass: Mean attention mass on the set; NaN for a class without samples.
        lift: Mass over the set's share of the tokens: 1 is chance.
        support: Number of samples that hold a token of the set.
        error: Standard error of ``mass``, where it was measured.
        outcome_mass: Mean mass in wrong and in right predictions.
        outcome_support: Number of samples behind each.
        outcome_error: Standard error of each.
        share: Mean share of the set among the tokens; ``None``: ``mass / lift``, which is not known without any mass.

    Shape:
        - mass, lift, support, error, share: ``(classes,)``
        - outcome_mass, outcome_support, outcome_error: ``(classes, 2)``, wrong before right

    Raises:
        ValueError: If the shapes do not fit together, or some but not all of the outcome fields are given.

    Example:
        >>> share = AttentionShare(torch.tensor([0.3, 0.1]), torch.tensor([3.0, 1.0]), torch.tensor([50, 40]))
        >>> share.chance
        tensor([0.1000, 0.1000], dtype=torch.float64)
    """

    mass: Tensor
    lift: Tensor
    support: Tensor
    error: Tensor | None = None
    outcome_mass: Tensor | None = None
    outcome_support: Tensor | None = None
    outcome_error: Tensor | None = None
    share: Tensor | None = None

    def __post_init__(self) -> None:
        shapes = [tuple(values.shape) for values in (self.mass, self.lift, self.support)]
        if len(set(shapes)) > 1 or len(shapes[0]) != 1:
            raise ValueError(f"`mass`, `lift` and `support` must all have shape (classes,), got {shapes}.")
        for name in ("error", "share"):
            if getattr(self, name) is not None:
                check_axes_of(name, getattr(self, name), shapes[0])
        given = {name: getattr(self, name) for name in _BY_OUTCOME if getattr(self, name) is not None}
        if given and len(given) < len(_BY_OUTCOME):
            raise ValueError(f"`outcome_mass`, `outcome_support` and `outcome_error` go together, got {list(given)}.")
        for name, tensor in given.items():
            check_axes_of(name, tensor, (*shapes[0], 2))
        for name in ("mass", "lift", "error", "share", "outcome_mass", "outcome_error"):
            hold(self, name, torch.float64)
        for name in ("support", "outcome_support"):
            hold(self, name, torch.int64)

    @property
    def chance(self) -> Tensor:
        """Mass under uniform attention, ``(classes,)``: the share of the set, as far as it is known."""
        return self.mass / self.lift if self.share is None else self.share

    @property
    def mass_error(self) -> Tensor:
        """Standard error of :attr:`mass`, ``(classes,)``.

        Where it was not measured, and where masses did not differ at all, what it is at most: masses spread less than
        hits and misses, and equal ones do not make certain.
        """
        bound = rate_error(self.mass, self.support)
        return bound if self.error is None else self.error.where(self.error > 0, bound)

    def to_dict(self) -> dict[str, object]:
        """Return the tensors as lists; ``None`` for those not measured, and in place of NaN."""
        return {name: plain(getattr(self, name)) for name in (*_MEASURED, *_BY_OUTCOME)}
