"""Masks that differ from query to query, read a block of queries at a time: no second matrix is made of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attn_callbacks.capture.rows import rows_at_once

__all__ = ["PairMask", "masked_pairs", "separated"]


@dataclass(frozen=True, eq=False)
class PairMask:
    """What is added to the scores, ``-inf`` where a query may not attend, for any block of queries.

    Args:
        read: Gives the additive mask of queries ``start..stop - 1``, as ``read(start, stop)``.
        read_keys: The same for a block of keys, with the axes of queries and keys swapped.
        maps: Number of samples and of heads in a block; 1 where all have the same mask.
        has_bias: Some finite entries differ from zero, or may do so.
        source: The mask itself, if it is a tensor.

    Shape:
        - read: ``(batch | 1, heads | 1, stop - start, keys)``
    """

    read: Callable[[int, int], Tensor]
    read_keys: Callable[[int, int], Tensor]
    maps: tuple[int, int]
    has_bias: bool
    source: Tensor | None = None

    def transposed(self) -> PairMask:
        """Return the mask with queries and keys swapped."""
        return replace(self, read=self.read_keys, read_keys=self.read)

    def scaled(self, factor: float) -> PairMask:
        """Return the mask with its biases times ``factor``."""
        return self._mapped(lambda block: block * factor)

    def causal(self) -> PairMask:
        """Return the mask in which, besides, no query attends to a later key."""
        return replace(self, read=_lower(self.read, diagonal=1), read_keys=_lower(self.read_keys, diagonal=-1))

    def part(self, batch: slice, heads: slice) -> PairMask:
        """Return the mask of some samples and heads."""

        def cut(block: Tensor) -> Tensor:
            block = block[batch] if len(block) > 1 else block
            return block[:, heads] if block.shape[1] > 1 else block

        sizes = (batch.stop - batch.start, heads.stop - heads.start)
        maps = tuple(min(own, size) for own, size in zip(self.maps, sizes, strict=True))
        return replace(self._mapped(cut), maps=maps)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> PairMask:
        read, read_keys = self.read, self.read_keys
        return replace(
            self,
            read=lambda start, stop: change(read(start, stop)),
            read_keys=lambda start, stop: change(read_keys(start, stop)),
        )


def masked_pairs(mask: Tensor, additive: Callable[[Tensor], Tensor]) -> PairMask:
    """Read a mask that exists: ``additive`` turns a block of it into what is added to the scores.

    Shape:
        - mask: ``(batch | 1, heads | 1, queries, keys)``
    """
    return PairMask(
        read=lambda start, stop: additive(mask[:, :, start:stop]),
        read_keys=lambda start, stop: additive(mask[..., start:stop].transpose(-2, -1)),
        maps=(mask.shape[0], mask.shape[1]),
        has_bias=mask.is_floating_point(),
        source=mask,
    )


def separated(pairs: PairMask, queries: int, keys: int) -> tuple[Tensor, Tensor] | None:
    """Write the finite entries of a mask as ``row[i] + column[j]``, which ALiBi and masks without a bias allow.

    Returns:
        Rows ``(batch | 1, heads | 1, queries)`` and columns ``(batch | 1, heads | 1, keys)``; ``None`` if they do not
        fit to within 1e-4.
    """
    step = rows_at_once(pairs.maps[0] * pairs.maps[1], keys, queries)
    blocks = range(0, queries, step)
    counts = torch.cat([(pairs.read(i, min(i + step, queries)) > -torch.inf).sum(dim=-1) for i in blocks], dim=-1)
    widest = counts.argmax(dim=-1)  # (batch, heads): the query that sees most keys shows their biases
    column = torch.full((*widest.shape, keys), -torch.inf, dtype=pairs.read(0, 1).dtype, device=counts.device)
    for i in blocks:
        block = pairs.read(i, min(i + step, queries))
        inside = (widest >= i) & (widest < i + block.shape[2])
        index = (widest - i).clamp(0, block.shape[2] - 1)[..., None, None].expand(*widest.shape, 1, keys)
        column = torch.where(inside[..., None], block.gather(2, index)[:, :, 0], column)
    seen = column > -torch.inf
    column = column.where(seen, 0.0)
    rows, fits = [], torch.ones((), dtype=torch.bool, device=counts.device)
    for i in blocks:
        block = pairs.read(i, min(i + step, queries))
        left = block - column[:, :, None]
        low = left.where(block > -torch.inf, torch.inf).amin(dim=-1)
        high = left.amax(dim=-1)
        alive = high > -torch.inf
        unseen = ((block > -torch.inf) & ~seen[:, :, None]).any()
        fits = fits & ~unseen & ((high - low).where(alive, 0.0) <= 1e-4).all()
        rows.append(high.where(alive, 0.0))
    return (torch.cat(rows, dim=-1), column) if bool(fits) else None


def _lower(read: Callable[[int, int], Tensor], diagonal: int) -> Callable[[int, int], Tensor]:
    """Forbid what lies above the diagonal (1) or, with queries and keys swapped, below it (-1)."""

    def cut(start: int, stop: int) -> Tensor:
        block = read(start, stop)
        rows = torch.arange(start, stop, device=block.device)[:, None]
        columns = torch.arange(block.shape[-1], device=block.device)
        return block.masked_fill((columns - rows) * diagonal > 0, -torch.inf)

    return cut
