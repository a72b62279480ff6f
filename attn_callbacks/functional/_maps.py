"""Attention maps with the rows and pairs that count, and the mass they put on expected keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from attn_callbacks.functional._precision import full_precision
from attn_callbacks.functional._scores import PatternScores

__all__ = ["Maps", "measured", "of_one_head"]


@dataclass(frozen=True, eq=False)
class Maps:
    """Maps of which uniform attention over the allowed keys is the measure.

    Every measure gives the `PatternScores` of the maps; what they are compared with is the same measure of uniform
    attention. A row without any weight is no data of its head; the other heads keep theirs.

    Args:
        weights: float32 ``(batch, heads, rows, keys)``, zero for other pairs and rows: `counted` sees to it.
        pairs: What may attend, bool ``(batch or 1, 1, rows or 1, keys)``.
    """

    weights: Tensor
    pairs: Tensor

    @classmethod
    def counted(cls, weights: Tensor, pairs: Tensor, wanted: Tensor) -> Maps:
        """Leave out whatever stands in pairs that may not attend, and in rows not ``wanted``: NaN times zero is NaN."""
        return cls(weights.where(pairs & wanted[..., None], 0.0).float(), pairs)

    @cached_property
    def rows(self) -> Tensor:
        """1 for the rows that are data, ``(batch, heads, rows)``."""
        return (self.weights.sum(dim=-1) != 0).to(self.weights.dtype)

    @cached_property
    def total(self) -> Tensor:
        """Number of rows that are data, ``(batch, heads)``."""
        return self.rows.sum(dim=-1)

    @cached_property
    def level(self) -> Tensor:
        """Weight that uniform attention gives to each allowed key, ``(batch, heads, rows)``; 0 for other rows."""
        return self.rows / self.pairs.sum(dim=-1).clamp_min(1)

    @cached_property
    def open(self) -> Tensor:
        """1 where a row may attend, ``(batch or 1, rows, keys)``."""
        return self.pairs.squeeze(1).to(self.weights.dtype).expand(-1, self.weights.shape[2], -1)

    @cached_property
    def received(self) -> Tensor:
        """Mass that each key gets from all rows together, ``(batch, heads, keys)``."""
        return self.weights.sum(dim=-2)

    def on_pairs(self, targets: Tensor) -> PatternScores:
        """Mass on the keys that each row expects, ``(batch or 1, patterns, rows, keys)``; the same for all heads."""
        marks = (targets & self.pairs).to(self.weights.dtype)
        columns = marks.flatten(2).transpose(1, 2)  # (batch or 1, rows * keys, patterns)
        return self._scores(self.weights.flatten(2) @ columns, marks.sum(dim=-1))

    def on_keys(self, keys: Tensor) -> PatternScores:
        """Mass on keys that all rows expect, ``(batch or 1, patterns, keys)``; the same for all heads."""
        marks = keys.to(self.weights.dtype)
        return self._scores(self.received @ marks.mT, marks @ self.open.mT)

    def at_steps(self, index: Tensor, exists: Tensor) -> PatternScores:
        """Mass on one key a pattern and row, ``(batch or 1, patterns, rows)``, then on all of them together."""
        batch, heads, rows, keys = self.weights.shape
        index = index.clamp(0, keys - 1).transpose(1, 2).expand(batch, rows, -1)
        may = self.open.expand(batch, -1, -1).gather(-1, index).transpose(1, 2) * exists  # (batch, patterns, rows)
        found = self.weights.gather(-1, index[:, None].expand(-1, heads, -1, -1))
        mass = torch.einsum("bhrp,bpr->bhp", found, may)
        mass, expected = (
            torch.cat([each, each.sum(dim=axis, keepdim=True)], dim=axis) for each, axis in ((mass, -1), (may, 1))
        )
        return self._scores(mass, expected)

    def stripes(self) -> PatternScores:
        """Mean mass on the key that stands out most, of those that half of the rows may attend to."""
        seen, total = self.rows @ self.open, self.total[..., None]  # (batch, heads, keys)
        scores = PatternScores(self.received / seen, self.level @ self.open / seen, seen / total)
        wide = (seen > 0) & (2 * seen >= total)
        rank = scores.strength().where(wide, torch.nan).nan_to_num(-torch.inf)
        top, best = rank.max(dim=-1, keepdim=True)
        score, chance, coverage = (field.gather(-1, best).masked_fill(top == -torch.inf, torch.nan) for field in scores)
        return PatternScores(score[..., 0], chance[..., 0], coverage[..., 0].nan_to_num(0.0))

    def overlap(self) -> PatternScores:
        """Share of the mass that lies as uniform attention has it; at the least ``1 / allowed keys``."""
        heads = zip(self.weights.unbind(dim=1), self.level.unbind(dim=1), strict=True)
        # head by head: the memory of a second map costs four times the minimum itself
        common = [torch.minimum(weights, level[..., None]).sum(dim=(-2, -1)) for weights, level in heads]
        score, chance = torch.stack(common, dim=1) / self.total, self.level.sum(dim=-1) / self.total
        return PatternScores(score, chance, (self.total > 0).to(score.dtype))

    def _scores(self, mass: Tensor, expected: Tensor) -> PatternScores:
        """Divide sums over rows by the rows that expect any key: ``expected (batch or 1, patterns, rows)`` keys."""
        count = self.rows @ (expected > 0).to(mass.dtype).mT  # (batch, heads, patterns)
        coverage = count / self.total.clamp_min(1)[..., None]
        return PatternScores(mass / count, self.level @ expected.mT / count, coverage)


def measured(
    measure: Callable[[Tensor, Tensor, Tensor], PatternScores], weights: Tensor, pairs: Tensor, wanted: Tensor
) -> PatternScores:
    """Measure all heads at once if they may attend to the same keys, else one after the other, in full precision.

    Args:
        measure: Of ``weights``, ``pairs`` and ``wanted``, for `Maps.counted`.
        weights: ``(batch, heads, rows, keys)``.
        pairs: What may attend, bool ``(batch or 1, heads or 1, rows or 1, keys)``.
        wanted: Rows asked for, bool ``(batch or 1, heads or 1, rows or 1)``.
    """
    weights, heads = weights.detach(), weights.shape[1]
    with full_precision(weights.device):
        if pairs.shape[1] == 1:
            return measure(weights, pairs, wanted)
        masks = pairs.expand(-1, heads, -1, -1), wanted.expand(-1, heads, -1)
        each = [measure(*(part[:, head, None] for part in (weights, *masks))) for head in range(heads)]
        return PatternScores(*(torch.cat(fields, dim=1) for fields in zip(*each, strict=True)))


def of_one_head(allowed: Tensor | None, heads: int) -> Tensor | None:
    """Cut a mask that was only expanded over the heads to one of them; no value is read."""
    if allowed is None or allowed.ndim < 3 or allowed.shape[-3] != heads or allowed.stride(-3):
        return allowed
    return allowed.narrow(-3, 0, 1)
