"""Which keys each role expects of each query, for the roles that say so."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attn_callbacks.functional._places import Grid, Places
from attn_callbacks.functional.token_patterns import duplicate_pairs, induction_pairs

__all__ = ["Scene"]


@dataclass(frozen=True, eq=False)
class Scene:
    """What is known of the tokens of a batch.

    Args:
        queries: Index of each row, ``(batch or 1, rows)``; ``None`` for cross-attention.
        known: ``True`` for keys that are no padding, ``(batch or 1, keys)``.
        limit: Distance beyond which a key is far away, ``(batch or 1,)``.
        tokens: Ids ``(batch, keys)``.
        special: Special tokens ``(batch or 1, keys)``.
        separator: Separators ``(batch, keys)``.
        segments: Number of the segment of each token ``(batch, keys)``.
        grid: Rows, columns, prefix.
        window: Distance up to which a key is near.
        ordered: Row ``i`` is query ``i``.
    """

    queries: Tensor | None
    known: Tensor
    limit: Tensor
    tokens: Tensor | None
    special: Tensor | None
    separator: Tensor | None
    segments: Tensor | None
    grid: Grid | None
    window: int
    ordered: bool

    def samples(self, start: int, stop: int) -> Scene:
        """Return the scene of some samples."""
        fields = {name: value[start:stop] for name, value in vars(self).items() if _has_batch(value)}
        return replace(self, **fields)

    def keys(self) -> dict[str, Tensor]:
        """Keys that all rows expect, bool ``(batch or 1, keys)``."""
        named = {"sink": self._first(), "special": self.special, "separator": self.separator}
        return {name: self.known & keys for name, keys in named.items() if keys is not None}

    def steps(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The one key that each row expects ``(batch or 1, rows)``, and whether it exists."""
        if self.queries is None:
            return {}
        _, columns, prefix = self.grid or (1, self.known.shape[-1], 0)
        inside, column = self.queries >= prefix, (self.queries - prefix) % columns
        return {
            "previous": (self.queries - 1, inside & (column > 0)),
            "next": (self.queries + 1, inside & (column < columns - 1)),
            "self": (self.queries, torch.ones_like(inside)),
        }

    def pairs(self) -> dict[str, Tensor]:
        """Keys that each row expects, bool ``(batch or 1, rows, keys)``."""
        if self.queries is None:
            return {}
        return self._geometric(self.queries) | self._textual(self.queries) | self._gathering(self.queries)

    def _first(self) -> Tensor:
        """The first token, ``(batch or 1, keys)``."""
        return self.known & (self.known.cumsum(dim=-1) == 1)

    def _geometric(self, queries: Tensor) -> dict[str, Tensor]:
        places = Places.between(queries, self.known.shape[-1], self.grid)
        distance = places.distance()
        found = {
            "local": places.inside & (distance <= self.window),
            "long_range": places.inside & (distance > self.limit[:, None, None]),
        }
        return found if self.grid is None else found | {"column": places.column(), "row": places.line()}

    def _textual(self, queries: Tensor) -> dict[str, Tensor]:
        found = {}
        if self.segments is not None:
            found["block"] = self._rows(self.segments, queries)[..., None] == self.segments[:, None]
        if self.tokens is not None:
            matches = self.known if self.special is None else self.known & ~self.special
            matches = matches.expand(self.tokens.shape)
            for name, pairs in (("duplicate", duplicate_pairs), ("induction", induction_pairs)):
                found[name] = self._rows(pairs(self.tokens, matches), queries)
        return found

    def _gathering(self, queries: Tensor) -> dict[str, Tensor]:
        """What the class token, and what all other tokens, would read of the content apart from themselves."""
        if self.special is None:
            return {}
        keys = torch.arange(self.known.shape[-1], device=queries.device)
        content = self.known & ~self.special
        leads = self._rows(self._first() & self.special, queries)[..., None]  # (batch or 1, rows, 1): is a class token
        reads = self._rows(content, queries)[..., None]
        return {
            "class_reads": leads & content[:, None],
            "others_read": reads & content[:, None] & (queries[..., None] != keys),
        }

    def _rows(self, values: Tensor, queries: Tensor) -> Tensor:
        """Take what belongs to the ``queries`` from ``values (batch or 1, tokens, ...)``."""
        if self.ordered:
            return values
        batch, trailing = max(len(values), len(queries)), values.shape[2:]
        index = queries.expand(batch, -1).view(batch, -1, *(1 for _ in trailing)).expand(-1, -1, *trailing)
        return values.expand(batch, -1, *trailing).gather(1, index)


def _has_batch(value: object) -> bool:
    return isinstance(value, Tensor) and len(value) > 1
