"""What surrounds attention rows: which pairs and rows count, and where rows and keys lie."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Frame"]


@dataclass(frozen=True, eq=False)
class Frame:
    """The arguments of `head_statistics` that are no attention.

    The methods check them and fill in what is missing, for ``attention (batch, heads, rows, keys)``: weights or
    logits, of which only shape and device matter.
    """

    positions: Tensor | None = None
    allowed: Tensor | None = None
    valid: Tensor | None = None
    key_valid: Tensor | None = None
    long_range: float = 0.25
    square: bool = True

    def __post_init__(self) -> None:
        if not self.long_range > 0:
            raise ValueError(f"`long_range` must be above 0, got {self.long_range}.")

    def pairs(self, attention: Tensor) -> Tensor:
        """Which pairs may attend: bool, four axes, broadcastable to ``attention``."""
        batch, _, _, keys = attention.shape
        pairs = torch.ones(1, 1, 1, keys, dtype=torch.bool, device=attention.device)
        if self.allowed is not None:
            try:
                self.allowed.expand(attention.shape)
            except RuntimeError:
                expected, got = tuple(attention.shape), tuple(self.allowed.shape)
                raise ValueError(f"`allowed` must be broadcastable to `weights` {expected}, got {got}.") from None
            pairs = pairs & self.allowed.bool()
        if self.key_valid is not None:
            if self.key_valid.shape != (batch, keys):
                got = tuple(self.key_valid.shape)
                raise ValueError(f"`key_valid` must have shape (batch, keys) = {(batch, keys)}, got {got}.")
            pairs = pairs & self.key_valid.bool()[:, None, None]
        return pairs

    def wanted(self, attention: Tensor) -> Tensor:
        """Which rows are asked for: bool, broadcastable to ``(batch, heads, rows)``."""
        batch, heads, rows, _ = attention.shape
        if self.valid is None:
            return torch.ones(1, 1, 1, dtype=torch.bool, device=attention.device)
        if self.valid.shape not in ((batch, rows), (batch, heads, rows)):
            raise ValueError(
                f"`valid` must have shape (batch, rows) = {(batch, rows)} or (batch, heads, rows) = "
                f"{(batch, heads, rows)}, got {tuple(self.valid.shape)}."
            )
        return (self.valid if self.valid.dim() == 3 else self.valid[:, None]).bool()

    def tokens(self, pairs: Tensor) -> Tensor:
        """Which keys are no padding, ``(batch or 1, keys)``: if not known, those that any row may attend to."""
        return pairs.any(dim=2).any(dim=1) if self.key_valid is None else self.key_valid.bool()

    def limit(self, tokens: Tensor) -> Tensor:
        """Distance beyond which a key is far away, ``(batch or 1,)``."""
        counts = tokens.sum(dim=-1).float()
        return self.long_range * counts if self.long_range < 1 else torch.full_like(counts, self.long_range)

    def queries(self, attention: Tensor) -> Tensor | None:
        """Query index of each row, ``(batch or 1, rows)``; ``None`` for cross-attention."""
        if not self.square:
            return None
        batch, _, rows, keys = attention.shape
        if self.positions is None:
            if rows != keys:
                raise ValueError(
                    f"`positions` must say which query each row is when {rows} rows meet {keys} keys. "
                    "For cross-attention pass `square=False`."
                )
            return torch.arange(rows, device=attention.device)[None]
        if self.positions.shape not in ((rows,), (batch, rows)):
            raise ValueError(
                f"`positions` must have shape (rows,) = {(rows,)} or (batch, rows) = {(batch, rows)}, "
                f"got {tuple(self.positions.shape)}."
            )
        return self.positions if self.positions.dim() == 2 else self.positions[None]
