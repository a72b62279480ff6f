"""Attention maps with the rows and pairs that count, and the mass they put on expected keys."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from attn_callbacks.functional._scores import PatternScores

__all__ = ["Maps", "full_precision"]


@dataclass(frozen=True, eq=False)
class Maps:
    """Maps of which uniform attention over the allowed keys is the measure.

    Every measure gives the `PatternScores` of the maps; what they are compared with is the same measure of uniform
    attention. ``some`` is 1 where nothing depends on the sample, or on the head.

    Args:
        weights: float32 ``(batch, heads, rows, keys)``, zero where a query may not attend.
        pairs: What may attend, bool ``(batch or 1, some heads, rows or 1, keys)``.
        wanted: Rows asked for, bool ``(batch or 1, some heads, rows or 1)``.
    """

    weights: Tensor
    pairs: Tensor
    wanted: Tensor

    @cached_property
    def rows(self) -> Tensor:
        """Rows that are data, ``(batch, some heads, rows)``: wanted, with an allowed key, not zero in all heads."""
        attends = (self.weights.sum(dim=-1) != 0).any(dim=1, keepdim=True)
        return attends & self.wanted & self.pairs.any(dim=-1)

    @cached_property
    def total(self) -> Tensor:
        """Number of rows that are data, ``(batch, some heads)``."""
        return self.rows.sum(dim=-1)

    @cached_property
    def level(self) -> Tensor:
        """Weight that uniform attention gives to each allowed key, ``(batch, some heads, rows)``; 0 for other rows."""
        return (self.rows / self.pairs.sum(dim=-1).clamp_min(1)).to(self.weights.dtype)

    @cached_property
    def uniform(self) -> Tensor:
        """Uniform attention over the allowed keys, ``(batch, some heads, rows, keys)``."""
        return self.pairs * self.level[..., None]

    @cached_property
    def received(self) -> Tensor:
        """Mass that each key gets from all rows together, ``(batch, heads, keys)``."""
        rows = self.rows.to(self.weights.dtype).expand(*self.weights.shape[:3])
        return (rows[:, :, None] @ self.weights).squeeze(-2)

    @cached_property
    def expected(self) -> Tensor:
        """The same of uniform attention, ``(batch, some heads, keys)``."""
        return self.uniform.sum(dim=-2)

    def on_pairs(self, targets: Tensor) -> PatternScores:
        """Mass on the keys that each row expects, ``(batch or 1, patterns, rows, keys)``; the same for all heads."""
        marks = (targets & (self.pairs & self.wanted[..., None])).to(self.weights.dtype)
        has = (marks.sum(dim=-1) > 0) & self.rows
        columns = marks.flatten(2).transpose(1, 2)  # (batch or 1, rows * keys, patterns)
        return self._scores(self.weights.flatten(2) @ columns, self.uniform.flatten(2) @ columns, has)

    def on_keys(self, keys: Tensor) -> PatternScores:
        """Mass on keys that all rows expect, ``(batch or 1, patterns, keys)``; the same for all heads."""
        columns = keys.transpose(1, 2).to(self.weights.dtype)
        seen = self.pairs.squeeze(1).to(self.weights.dtype) @ columns  # (batch or 1, rows or 1, patterns)
        has = (seen > 0).transpose(1, 2) & self.rows
        return self._scores(self.received @ columns, self.expected @ columns, has)

    def at_steps(self, index: Tensor, exists: Tensor) -> PatternScores:
        """Mass on one key a pattern and row, ``(batch or 1, patterns, rows)``, then on all of them together."""
        batch, heads, rows, keys = self.weights.shape
        index = index.clamp(0, keys - 1).transpose(1, 2)[:, None].expand(batch, heads, rows, -1)
        may = self.pairs.expand(batch, 1, rows, keys).gather(-1, index[:, :1]).squeeze(1).transpose(1, 2)
        has = may & exists & self.rows  # (batch, patterns, rows)
        mass, chance = (
            torch.einsum("bhrp,bpr->bhp", weights.gather(-1, index[:, : weights.shape[1]]), has.to(weights.dtype))
            for weights in (self.weights, self.uniform)
        )
        mass, chance = (torch.cat([each, each.sum(dim=-1, keepdim=True)], dim=-1) for each in (mass, chance))
        return self._scores(mass, chance, torch.cat([has, has.any(dim=1, keepdim=True)], dim=1))

    def stripes(self) -> PatternScores:
        """Mean mass on the key that stands out most, of those that half of the rows may attend to."""
        heads = self.weights.shape[1]
        seen = (self.pairs & self.rows[..., None]).sum(dim=-2)  # (batch, some heads, keys)
        scores = PatternScores(self.received / seen, self.expected / seen, seen / self.total[..., None])
        scores = PatternScores(*(field.expand(-1, heads, -1) for field in scores))
        wide = (seen > 0) & (2 * seen >= self.total[..., None])
        rank = scores.strength().where(wide, torch.nan).nan_to_num(-torch.inf)
        top, best = rank.max(dim=-1, keepdim=True)
        score, chance, coverage = (field.gather(-1, best).masked_fill(top == -torch.inf, torch.nan) for field in scores)
        return PatternScores(score[..., 0], chance[..., 0], coverage[..., 0].nan_to_num(0.0))

    def overlap(self) -> PatternScores:
        """Share of the mass that lies as uniform attention has it; at the least ``1 / allowed keys``."""
        total = self.total.expand(self.weights.shape[:2])
        heads = zip(self.weights.unbind(dim=1), self.level.expand(-1, total.shape[1], -1).unbind(dim=1), strict=True)
        # head by head: the memory of a second map costs four times the minimum itself
        common = [torch.minimum(weights, level[..., None]).sum(dim=(-2, -1)) for weights, level in heads]
        score = torch.stack(common, dim=1) / total
        chance = (self.level.sum(dim=-1) / total).expand_as(score)
        return PatternScores(score, chance, (total > 0).to(score.dtype))

    def _scores(self, mass: Tensor, chance: Tensor, has: Tensor) -> PatternScores:
        """Divide sums over rows ``(batch, heads or 1, patterns)`` by the rows that ``has (batch, patterns, rows)``."""
        count = has.sum(dim=-1)[:, None]
        coverage = count / self.total.clamp_min(1)[..., None]
        return PatternScores(mass / count, *((field / 1).expand_as(mass) for field in (chance / count, coverage)))


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Keep autocast from turning products of float32 into half precision, on devices that have it."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()
