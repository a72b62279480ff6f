"""Attention in the form that kernels take it, and the cuts, flips and transposes that statistics need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from attn_callbacks.capture.exact.blocks import in_blocks
from attn_callbacks.capture.exact.kernel import attend
from attn_callbacks.capture.exact.pairs import PairMask
from attn_callbacks.capture.rows import rows_at_once

__all__ = ["Problem", "cached_heads", "cached_rows", "cut", "in_parts"]

_PART_BYTES = 48 * 2**20
_CACHED = 2**19  # scores, 2 MB
_ENOUGH = 128  # rows
_SLICE = 128  # columns in the value slot of one call


@dataclass(frozen=True, eq=False)
class Problem:
    """Queries, keys and everything that is added to their scores.

    Args:
        query: Queries.
        key: Keys.
        scale: Factor on ``query @ key``.
        is_causal: Query ``i`` may attend to keys ``0..i``.
        key_bias: Added to the scores of a key, whatever the query; ``-inf`` for keys that nobody attends to.
        pairs: Added to the scores besides.
        separated: The biases in ``pairs`` as one of the query plus one of the key, where they were found to be that.
        known_logsumexp: The log-sum-exp of every row without a graph, if it was computed before.

    Shape:
        - query: ``(batch, heads, queries, head_dim)``
        - key: ``(batch, key_heads, keys, head_dim)``
        - key_bias: ``(batch | 1, heads | 1, 1, keys)``
        - separated: ``(batch | 1, heads | 1, queries)`` and ``(batch | 1, heads | 1, keys)``
        - known_logsumexp: ``(batch, heads, queries)``
    """

    query: Tensor
    key: Tensor
    scale: float
    is_causal: bool = False
    key_bias: Tensor | None = None
    pairs: PairMask | None = None
    separated: tuple[Tensor, Tensor] | None = None
    known_logsumexp: Tensor | None = None

    @property
    def lengths(self) -> tuple[int, int]:
        """Numbers of queries and keys."""
        return self.query.shape[2], self.key.shape[2]

    def tensors(self) -> list[Tensor]:
        """What it is made of."""
        source = None if self.pairs is None else self.pairs.source
        return [tensor for tensor in (self.query, self.key, self.key_bias, source) if tensor is not None]

    def choices(self) -> Tensor:
        """Count the keys that each query may attend to, ``(batch | 1, heads | 1, queries)``."""
        queries, keys = self.lengths
        if self.pairs is not None:

            def count(start: int, stop: int) -> tuple[Tensor]:
                return ((cast(Tensor, self.bias(start, stop)) > -torch.inf).sum(dim=-1),)

            return in_blocks(queries, self._step(), count, keeps_graph=False)[0]
        open_keys = torch.ones(1, 1, 1, keys, dtype=torch.bool, device=self.key.device)
        if self.key_bias is not None:
            open_keys = self.key_bias > -torch.inf
        if not self.is_causal:
            return open_keys.sum(dim=-1).expand(*open_keys.shape[:2], queries)
        seen = open_keys[:, :, 0].cumsum(dim=-1)
        return seen[..., torch.arange(queries, device=seen.device).clamp(max=keys - 1)]

    def attend(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Average ``value (batch, key_heads, keys, width)`` under attention, and return the log-sum-exp of every row.

        Rows without keys have zeros and ``-inf``.
        """
        slices = value.split(_SLICE, dim=-1) if value.shape[-1] > _SLICE + self.query.shape[-1] else (value,)
        outputs, logsumexps = zip(*(self._attend(columns) for columns in slices), strict=True)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1), logsumexps[0]

    def transposed(self, row_bias: Tensor) -> Problem:
        """Swap queries and keys; ``row_bias (batch, heads, queries)`` is added to the scores of each old query.

        Biases of the old keys stay behind: they are constants of the new rows. Causal attention without a mask of pairs
        needs as many queries as keys and comes back with both sequences in reverse order, in which it is causal again.
        """
        key = self.key.repeat_interleave(self.query.shape[1] // self.key.shape[1], dim=1)
        turned = Problem(key, self.query, self.scale, key_bias=row_bias[:, :, None])
        if self.pairs is not None:
            pairs = self.pairs.causal() if self.is_causal else self.pairs
            return replace(turned, pairs=pairs.transposed())
        return replace(turned.flipped(), is_causal=True) if self.is_causal else turned

    def flipped(self) -> Problem:
        """Reverse the order of both sequences, without a mask of pairs; attention that was causal is not."""
        bias = None if self.key_bias is None else self.key_bias.flip(-1)
        return Problem(self.query.flip(2), self.key.flip(2), self.scale, key_bias=bias)

    def scaled(self, factor: float) -> Problem:
        """Multiply all scores by ``factor``."""
        return replace(
            self,
            scale=self.scale * factor,
            key_bias=None if self.key_bias is None else self.key_bias * factor,
            pairs=None if self.pairs is None else self.pairs.scaled(factor),
            known_logsumexp=None,
        )

    def detached(self) -> Problem:
        """Return the problem without its graph."""
        bias = None if self.key_bias is None else self.key_bias.detach()
        return replace(self, query=self.query.detach(), key=self.key.detach(), key_bias=bias)

    def part(self, batch: slice, key_heads: slice) -> Problem:
        """Return the problem of some samples and key heads, with the queries that read them."""
        group = self.query.shape[1] // self.key.shape[1]
        heads = slice(key_heads.start * group, key_heads.stop * group)
        parts = self.separated
        return replace(
            self,
            query=self.query[batch, heads],
            key=self.key[batch, key_heads],
            key_bias=None if self.key_bias is None else cut(self.key_bias, batch, heads),
            pairs=None if self.pairs is None else self.pairs.part(batch, heads),
            separated=None if parts is None else (cut(parts[0], batch, heads), cut(parts[1], batch, heads)),
            known_logsumexp=None if self.known_logsumexp is None else self.known_logsumexp[batch, heads],
        )

    def bias(self, start: int, stop: int) -> Tensor | None:
        """What is added to the scores of queries ``start..stop - 1``, ``-inf`` where they may not attend.

        Four axes, broadcastable to the scores; ``None`` where nothing is.
        """
        bias = None if self.pairs is None else self.pairs.read(start, stop).to(self.query.dtype)
        if self.key_bias is not None:
            bias = self.key_bias if bias is None else bias + self.key_bias
        if not self.is_causal:
            return bias
        rows, keys = (torch.arange(*ends, device=self.key.device) for ends in ((start, stop), (0, self.lengths[1])))
        future = keys > rows[:, None]
        known = torch.zeros(1, 1, 1, 1, dtype=self.key.dtype, device=self.key.device) if bias is None else bias
        return torch.where(future, -torch.inf, known)

    def scores(self, columns: Tensor, start: int, stop: int) -> Tensor:
        """Make the scores of queries ``start..stop - 1``, without the keys behind the last of them if causal.

        ``columns`` are the keys of every query head, ``(batch, heads, head_dim, keys)``.
        """
        seen = min(stop, columns.shape[-1]) if self.is_causal else columns.shape[-1]
        scores: Tensor = (self.scale * self.query[:, :, start:stop]) @ columns[..., :seen]
        bias = replace(self, is_causal=False).bias(start, stop)
        if bias is not None:
            scores = scores.add_(bias[..., :seen])
        if self.is_causal and start < seen:  # only the last keys lie in the future of some of these queries
            future = torch.ones(stop - start, seen - start, dtype=torch.bool, device=scores.device).triu(1)
            scores[..., start:].masked_fill_(future, -torch.inf)
        return scores

    def _step(self) -> int:
        """Queries in a block of a mask of pairs."""
        queries, keys = self.lengths
        maps = [bias.shape[:2] for bias in (self.key_bias,) if bias is not None]
        maps += [torch.Size(pairs.maps) for pairs in (self.pairs,) if pairs is not None]
        return rows_at_once(torch.broadcast_shapes(*maps).numel(), keys, queries)

    def _attend(self, value: Tensor) -> tuple[Tensor, Tensor]:
        if self.pairs is not None:
            return self._attend_in_blocks(value)
        output, logsumexp = attend(
            self.query, self.key, value, self.key_bias, is_causal=self.is_causal, scale=self.scale
        )
        if self.key_bias is None:
            return output, logsumexp
        return output, logsumexp.masked_fill(self.choices() == 0, -torch.inf)

    def _attend_in_blocks(self, value: Tensor) -> tuple[Tensor, Tensor]:
        queries, keys = self.lengths

        def block(start: int, stop: int) -> tuple[Tensor, Tensor]:
            seen = min(stop, keys) if self.is_causal else keys
            query, key, columns = self.query[:, :, start:stop], self.key[:, :, :seen], value[:, :, :seen]
            bias = cast(Tensor, self.bias(start, stop))[..., :seen]
            output, logsumexp = attend(query, key, columns, bias, scale=self.scale)
            return output, logsumexp.masked_fill(bias.amax(dim=-1) == -torch.inf, -torch.inf)

        tensors = (self.query, self.key, value)
        keeps_graph = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        output, logsumexp = in_blocks(queries, self._step(), block, keeps_graph, self.tensors())
        return output, logsumexp


def cached_rows(maps: int, keys: int) -> int:
    """Return how many rows of so many maps a processor's cache holds."""
    return max(16, _CACHED // max(maps * keys, 1))


def cached_heads(problem: Problem) -> int:
    """Return of how many key heads a processor's cache holds enough rows for an efficient product."""
    group = problem.query.shape[1] // max(problem.key.shape[1], 1)
    return max(1, cached_rows(group, problem.lengths[1]) // _ENOUGH)


def cut(tensor: Tensor, batch: slice, heads: slice) -> Tensor:
    """Take samples and heads of a tensor that may be broadcast along either axis."""
    tensor = tensor[batch] if len(tensor) > 1 else tensor
    return tensor[:, heads] if tensor.shape[1] > 1 else tensor


def in_parts(
    problem: Problem,
    width: int,
    compute: Callable[[Problem, slice, slice], tuple[Tensor, ...]],
    most: int | None = None,
) -> tuple[Tensor, ...]:
    """Compute statistics for some samples and heads at a time, so that many heads need no more memory than a few.

    Args:
        problem: The whole.
        width: Columns in the value slot.
        compute: Gets a part, its samples and its heads; returns tensors ``(batch, heads, ...)``.
        most: Key heads at a time; ``None``: as many as a few megabytes hold.
    """
    batch, key_heads = problem.key.shape[:2]
    group = problem.query.shape[1] // max(key_heads, 1)
    queries, keys = problem.lengths
    widest = max(width, problem.query.shape[-1])
    each = 4 * widest * (2 * keys + 2 * group * queries)  # bytes a key head: keys, values, queries, output
    most = max(1, _PART_BYTES // max(each, 1)) if most is None else most
    samples, heads = (max(1, most // key_heads), key_heads) if most >= key_heads else (1, most)
    if samples >= batch and heads >= key_heads:
        return compute(problem, slice(0, batch), slice(0, key_heads * group))
    wholes: list[Tensor] = []
    for first in range(0, batch, samples):
        rows = slice(first, min(first + samples, batch))
        for head in range(0, key_heads, heads):
            own = slice(head, min(head + heads, key_heads))
            columns = slice(own.start * group, own.stop * group)
            parts = compute(problem.part(rows, own), rows, columns)
            if not wholes:  # filled part by part: joining them at the end would hold everything twice
                wholes = [part.new_empty(batch, key_heads * group, *part.shape[2:]) for part in parts]
            for whole, part in zip(wholes, parts, strict=True):
                whole[rows, columns] = part
    return tuple(wholes)
