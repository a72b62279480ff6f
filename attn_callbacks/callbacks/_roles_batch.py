"""What a batch says about its tokens, and the scores that it gives every head of a call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attn_callbacks._checks import integer
from attn_callbacks.batch import BatchSchema
from attn_callbacks.callbacks._layers import drawn_rows, known_tokens, maps_per_sample
from attn_callbacks.callbacks._samples import patch_grid
from attn_callbacks.capture import AttentionCall
from attn_callbacks.functional.patterns import PatternScores
from attn_callbacks.functional.roles import head_roles

__all__ = ["RoleReader", "RowMaps", "id_list", "scores_of_samples", "token_ids"]

Grid = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class RowMaps:
    """Some rows of the attention of one call, and what is known about them.

    Shape:
        - weights: ``(batch, heads, rows, keys)``
        - positions: ``(batch, rows)``, or ``None`` for all rows in their order
        - allowed: bool, one for all heads, broadcastable to ``weights``
        - valid: bool ``(batch, rows)``
        - key_valid: bool ``(batch, keys)``
    """

    weights: Tensor
    positions: Tensor | None
    allowed: Tensor
    valid: Tensor
    key_valid: Tensor
    square: bool


class RoleReader:
    """Reads batches, and scores calls by what the last one said.

    Args:
        schema: Where a batch has what.
        special: Ids of special tokens.
        separator: Ids of separators.
        grid: Rows, columns and prefix of patches; ``None`` asks the image of the batch.
        rows: Rows looked at in each sequence.
    """

    def __init__(
        self, schema: BatchSchema, special: Sequence[int], separator: Sequence[int], grid: Grid | None, rows: int
    ) -> None:
        self._schema, self._grid, self._rows = schema, grid, rows
        self._ids = tuple(special), tuple(separator)
        self._generator = torch.Generator()

    def read(self, batch: Any, number: int) -> int | None:
        """Take in a batch, the ``number``-th of its loader, and return how many samples it has, if that is known."""
        tokens, image = self._schema.read("tokens", batch), self._schema.read("image", batch)
        is_ids = isinstance(tokens, Tensor) and not tokens.is_floating_point()
        self._tokens: Tensor | None = tokens if is_ids else None
        self._valid = self._schema.flags("valid", batch)
        self._shape = tuple(image.shape[-2:]) if isinstance(image, Tensor) and image.dim() == 4 else None
        self._size, self._seed = self._schema.size(batch), number
        return self._size

    def maps(self, call: AttentionCall) -> RowMaps:
        """Return the rows that are looked at: the same ones in all layers, and in every epoch."""
        call = known_tokens(call, self._valid)
        rows, valid = drawn_rows(call, self._rows, self._generator.manual_seed(self._seed))
        # recorded weights show their mask head by head, by what is above zero
        allowed = call.allowed(rows).any(dim=1, keepdim=True)
        square = not call.is_cross and call.shape[2] == call.shape[3]
        return RowMaps(call.weights(rows), rows, allowed, valid, call.key_valid, square)

    def scores(self, call: AttentionCall, maps: RowMaps) -> PatternScores:
        """Score every head for every role, ``(samples, heads, roles)``; windows and crops of a sample are averaged."""
        tokens, keys = self._tokens, maps.weights.shape[-1]
        if tokens is None or call.is_decoder or tokens.shape != (len(maps.weights), keys):
            tokens = None
        special, separator = (None if tokens is None else _among(tokens, ids) for ids in self._ids)
        grid = self._grid
        if grid is None and self._shape is not None and tokens is None:
            grid = patch_grid(keys, self._shape[0] / self._shape[1])
        found = head_roles(
            maps.weights,
            tokens if maps.square else None,
            special=special,
            separator=separator,
            grid=grid if maps.square else None,
            positions=maps.positions if maps.square else None,
            allowed=maps.allowed,
            valid=maps.valid,
            key_valid=maps.key_valid,
            square=maps.square,
        )
        return scores_of_samples(found, self._size)


def scores_of_samples(scores: PatternScores, samples: int | None) -> PatternScores:
    """Average windows or crops of one sample, so that a sample counts once.

    Shape:
        - scores: each field ``(batch, heads, roles)``
        - output: each field ``(samples, heads, roles)``
    """
    if maps_per_sample(len(scores.score), samples) < 2:
        return scores
    defined = ~scores.score.isnan()
    score, chance = (field.where(defined, torch.nan) for field in (scores.score, scores.chance))
    return PatternScores(*(field.unflatten(0, (samples, -1)).nanmean(dim=1) for field in (score, chance, scores[2])))


def id_list(name: str, given: Sequence[int] | None) -> tuple[int, ...] | None:
    """Return a list of numbers as a tuple.

    Raises:
        TypeError: If it is a single string or number, or holds something else.
    """
    if given is None:
        return None
    if isinstance(given, (str, int)):
        raise TypeError(f"`{name}` must be a list of numbers, got {given!r}. Pass [{given!r}].")
    return tuple(integer(name, number) for number in given)


def token_ids(given: Sequence[int] | None, tokenizer: Any, name: str) -> tuple[int, ...]:
    """Return the ids that were given, or those that a tokenizer names; none without both."""
    if given is not None:
        return tuple(given)
    known = getattr(tokenizer, name, None)
    return tuple(known) if isinstance(known, (list, tuple)) else () if known is None else (int(known),)


def _among(tokens: Tensor, ids: Sequence[int]) -> Tensor | None:
    if not ids:
        return None
    marks = torch.zeros_like(tokens, dtype=torch.bool)
    for number in ids:  # few, and nothing is copied to a device
        marks |= tokens == number
    return marks
