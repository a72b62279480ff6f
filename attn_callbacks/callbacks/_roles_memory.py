"""Attention maps of fixed samples, kept from one validation to the next: how far heads moved, and lie apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attn_callbacks.callbacks._roles_batch import RowMaps
from attn_callbacks.functional.head_distance import head_distance, head_drift

__all__ = ["LAYER_BYTES", "HeadMemory"]

LAYER_BYTES = 8 * 2**20
"""What the weights of one layer may take, of all samples together, in each of two validations."""
_MOST_MAPS = 64  # windows of one sample are maps of their own
_MOST_TERMS = 2**28  # logarithms for the distances of all pairs

Piece = tuple[str, int]


@dataclass(frozen=True, eq=False)
class _Kept:
    weights: Tensor
    allowed: Tensor
    valid: Tensor
    key_valid: Tensor
    square: bool

    def every(self, step: int) -> _Kept:
        """Return every ``step``-th row."""
        rows = slice(None, None, step)
        allowed = self.allowed[:, :, rows] if self.allowed.shape[2] > 1 else self.allowed
        return _Kept(self.weights[:, :, rows], allowed, self.valid[:, rows], self.key_valid, self.square)

    def on_host(self) -> _Kept:
        """Return a copy on the CPU, also for use outside of inference mode."""
        parts = [part.cpu() for part in (self.weights, self.allowed, self.valid, self.key_valid)]
        with torch.inference_mode(False):
            weights, allowed, valid, key_valid = (part.clone() for part in parts)
        return _Kept(weights, allowed, valid, key_valid, self.square)


class HeadMemory:
    """Keep the maps of the first samples of a validation on the CPU, in float32, and compare them with the last ones.

    Of long sequences some rows are kept, such that a layer takes at most ``LAYER_BYTES``.

    Args:
        samples: How many samples are kept.
    """

    def __init__(self, samples: int) -> None:
        self._samples = samples
        self._old: dict[Piece, _Kept] = {}
        self._new: dict[Piece, _Kept] = {}
        self._marks: tuple[list[Any], list[Any]] = ([], [])  # of the samples of the last and this validation
        self.shuffled = False
        """The samples of this validation are not those of the last one."""
        self.begin()

    def begin(self) -> None:
        """Start a validation."""
        self._left, self._piece, self._entries = self._samples, -1, 0
        self._new, self._marks, self.shuffled = {}, (self._marks[0], []), False
        self._moved: dict[str, list[Tensor]] = {}

    def see(self, size: int | None, inputs: Any) -> None:
        """Take in that a batch comes.

        Args:
            size: Its number of samples; where that is not known, it is the only one looked at.
            inputs: What tells its samples from others: a tensor ``(samples, ...)``, or ``None``.
        """
        self._size, self._entries = size, min(self._left, self._left if size is None else size)
        self._left = 0 if size is None else self._left - self._entries
        self._piece += 1
        if not self._entries:
            return
        mark = None
        if isinstance(inputs, Tensor) and inputs.dim():
            mark = inputs[: self._entries].detach().double().flatten(1).sum(dim=1).cpu()
        self._marks[1].append(mark)
        if self._piece < len(self._marks[0]) and not _same(self._marks[0][self._piece], mark):
            self.shuffled = True

    def take(self, layer: str, maps: RowMaps) -> None:
        """Keep what a layer of this batch attends to, as far as it is wanted."""
        if not self._entries:
            return
        batch, heads, rows, keys = maps.weights.shape
        per_sample = batch // self._size if self._size and batch % self._size == 0 else 1
        first = slice(0, min(self._entries * per_sample, batch, _MOST_MAPS))
        whole = maps.allowed[first] if len(maps.allowed) > 1 else maps.allowed
        taken = _Kept(
            maps.weights[first].detach().float(), whole, maps.valid[first], maps.key_valid[first], maps.square
        )
        room = LAYER_BYTES // (4 * heads * keys * max(self._samples * per_sample, len(taken.weights)))
        taken = taken.every(-(-rows // max(room, 1)))
        piece = layer, self._piece
        old = self._old.get(piece)
        if old is not None and not self.shuffled and old.weights.shape == taken.weights.shape:
            before = old.weights.to(taken.weights.device)
            moved = head_drift(
                before, taken.weights, allowed=taken.allowed, valid=taken.valid, key_valid=taken.key_valid
            )
            self._moved.setdefault(layer, []).append(moved)
        self._new[piece] = taken.on_host()

    def drift(self) -> dict[str, Tensor]:
        """Return how far the heads of each layer have moved since the last validation, ``(heads,)``; and go on to it.

        Root of the mean squared distance over samples, NaN where no row says anything.
        """
        found = {layer: torch.cat(parts).double().cpu() for layer, parts in self._moved.items()}
        self._old, self._marks = self._new or self._old, (self._marks[1] or self._marks[0], [])
        moved = {} if self.shuffled else found
        return {layer: each.square().nanmean(dim=0).sqrt() for layer, each in moved.items()}

    def distances(self, device: torch.device) -> tuple[Tensor, list[str], list[int]]:
        """Return distances of all heads that see the same, ``(samples, heads, heads)``, their layers and their numbers.

        Layers with other keys, rows or masks than most are left out.
        """
        layers = self._comparable()
        sizes = [self._old[layer, 0].weights.shape[1] for layer in layers]
        pieces = sorted({piece for layer, piece in self._old if layer in layers})
        pieces = [piece for piece in pieces if all((layer, piece) in self._old for layer in layers)]
        terms = sum(sizes) ** 2 // 2 * sum(self._old[layers[0], piece].weights[:, 0].numel() for piece in pieces)
        step = max(1, -(-terms // _MOST_TERMS))
        found = []
        for piece in pieces:
            kept = [self._old[layer, piece].every(step) for layer in layers]
            one = kept[0]
            masks = (one.allowed.to(device), one.valid.to(device), one.key_valid.to(device))
            weights = [each.weights.to(device) for each in kept]
            found.append(head_distance(weights, allowed=masks[0], valid=masks[1], key_valid=masks[2]))
        return torch.cat(found).cpu(), layers, sizes

    def _comparable(self) -> list[str]:
        """Return the layers that see the same keys, of the kind that has most heads."""
        groups: list[list[str]] = []
        for layer in (layer for layer, piece in self._old if piece == 0):
            for group in groups:
                if _alike(self._old[group[0], 0], self._old[layer, 0]):
                    group.append(layer)
                    break
            else:
                groups.append([layer])
        return max(groups, key=lambda group: sum(self._old[layer, 0].weights.shape[1] for layer in group))


def _alike(one: _Kept, other: _Kept) -> bool:
    shapes = [(len(kept.weights), *kept.weights.shape[2:], kept.square) for kept in (one, other)]
    if shapes[0] != shapes[1]:
        return False
    pairs: Sequence[tuple[Tensor, Tensor]] = (
        (one.allowed, other.allowed),
        (one.valid, other.valid),
        (one.key_valid, other.key_valid),
    )
    return all(first.shape == second.shape and torch.equal(first, second) for first, second in pairs)


def _same(before: Any, now: Any) -> bool:
    if not isinstance(before, Tensor) or not isinstance(now, Tensor):
        return before is now
    return before.shape == now.shape and torch.equal(before, now)
