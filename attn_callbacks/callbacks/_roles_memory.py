"""Attention maps of fixed samples, kept from one validation to the next: how far heads moved, and lie apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_callbacks.callbacks._roles_batch import RowMaps
from attn_callbacks.callbacks._roles_copies import bits_to_host, sample_marks
from attn_callbacks.functional.head_distance import head_distance, head_drift

__all__ = ["LAYER_BYTES", "HeadMemory"]

LAYER_BYTES = 8 * 2**20
"""What the weights of one layer may take, of all samples together, in each of two validations."""
_WAITING_BYTES = 64 * 2**20  # weights that wait on their device for the one copy at the end of a validation
_MOST_MAPS = 64  # windows of one sample are maps of their own
_MOST_TERMS = 2**28  # logarithms for the distances of all pairs

Piece = tuple[str, int]
Marks = list[Tensor | None]


@dataclass(frozen=True, eq=False)
class _Kept:
    weights: Tensor
    allowed: Tensor
    valid: Tensor
    key_valid: Tensor
    square: bool

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Everything that lies on a device."""
        return self.weights, self.allowed, self.valid, self.key_valid

    def every(self, step: int) -> _Kept:
        """Return every ``step``-th row."""
        rows = slice(None, None, step)
        allowed = self.allowed[:, :, rows] if self.allowed.shape[2] > 1 else self.allowed
        return _Kept(self.weights[:, :, rows], allowed, self.valid[:, rows], self.key_valid, self.square)

    def alone(self) -> _Kept:
        """Return a copy, which holds nothing of the batch it comes from."""
        weights, allowed, valid, keys = (part.clone(memory_format=torch.contiguous_format) for part in self.parts)
        return _Kept(weights, allowed, valid, keys, self.square)


class HeadMemory:
    """Keep the maps of the first samples of a validation on the CPU, in float32, and compare them with the last ones.

    Of long sequences some rows are kept, such that a layer takes at most ``LAYER_BYTES``; where not even a row of each
    sample fits, a row of the first samples, or nothing. During a validation they stay on their device.

    Args:
        samples: How many samples are kept.
    """

    def __init__(self, samples: int) -> None:
        self._samples = samples
        self._old: dict[Piece, _Kept] = {}
        self._marks: tuple[Marks, Marks] = ([], [])  # of the samples of the last and this validation
        self.shuffled = False
        """The samples of this validation are not those of the last one; known once drift was asked for."""
        self.begin()

    def begin(self) -> None:
        """Start a validation."""
        self._left, self._piece, self._entries = self._samples, -1, 0
        self._marks, self.shuffled = (self._marks[0], []), False
        self._new: dict[Piece, _Kept] = {}
        self._waiting: dict[Piece, _Kept] = {}
        self._moved: dict[str, list[Tensor]] = {}
        self._taken: dict[str, int] = {}  # bytes of each layer
        self._waiting_bytes = 0

    def see(self, size: int | None, inputs: Tensor | None) -> None:
        """Take in that a batch comes.

        Args:
            size: Its number of samples; where that is not known, it is the only one looked at.
            inputs: What tells its samples from others: a tensor ``(samples, ...)``, or ``None``.
        """
        self._size, self._entries = size, min(self._left, self._left if size is None else size)
        self._left = 0 if size is None else self._left - self._entries
        self._piece += 1
        if self._entries:
            self._marks[1].append(None if inputs is None else sample_marks(inputs[: self._entries]))

    def take(self, layer: str, maps: RowMaps) -> None:
        """Keep what a layer of this batch attends to, as far as it is wanted and there is room."""
        taken = self._fitting(layer, maps) if self._entries else None
        if taken is None:
            return
        piece = layer, self._piece
        old = self._old.get(piece)
        if old is not None and old.weights.shape == taken.weights.shape:
            before = old.weights.to(taken.weights.device, non_blocking=True)
            moved = head_drift(
                before, taken.weights, allowed=taken.allowed, valid=taken.valid, key_valid=taken.key_valid
            )
            self._moved.setdefault(layer, []).append(moved)
        self._waiting[piece] = taken.alone()
        self._waiting_bytes += _bytes(taken)
        if self._waiting_bytes > _WAITING_BYTES:
            self._fetch([])

    def _fitting(self, layer: str, maps: RowMaps) -> _Kept | None:
        """Return as many rows of the wanted samples as fit, of long sequences those of fewer samples; or nothing."""
        batch, heads, rows, keys = maps.weights.shape
        per_sample = batch // self._size if self._size and batch % self._size == 0 else 1
        wanted = min(self._entries * per_sample, batch, max(_MOST_MAPS, self._entries))
        size = 4 * heads * keys  # of one row
        room = LAYER_BYTES // (size * max(self._samples * per_sample, wanted))
        step = -(-rows // max(room, 1))
        left = LAYER_BYTES - self._taken.get(layer, 0)
        count = min(wanted, left // (size * -(-rows // step)))
        if count < 1:
            return None
        first = slice(0, count)
        allowed = maps.allowed[first] if len(maps.allowed) > 1 else maps.allowed
        weights, valid = maps.weights[first].detach().float(), maps.valid[first]
        taken = _Kept(weights, allowed, valid, maps.key_valid[first], maps.square).every(step)
        self._taken[layer] = self._taken.get(layer, 0) + _bytes(taken)
        return taken

    def _fetch(self, others: Sequence[Tensor]) -> list[Tensor]:
        """Copy what waits to the host, together with other tensors, whose copies are returned."""
        parts = [part for kept in self._waiting.values() for part in kept.parts]
        copies = bits_to_host([*others, *parts])
        rest = iter(copies[len(others) :])
        for piece, kept in self._waiting.items():
            self._new[piece] = _Kept(next(rest), next(rest), next(rest), next(rest), kept.square)
        self._waiting, self._waiting_bytes = {}, 0
        return copies[: len(others)]

    def drift(self) -> dict[str, Tensor]:
        """Return how far the heads of each layer have moved since the last validation, ``(heads,)``; and go on to it.

        Root of the mean squared distance over samples, NaN where no row says anything; empty of a shuffled loader.
        """
        moved = {layer: torch.cat(parts) for layer, parts in self._moved.items()}
        copies = iter(self._fetch([*moved.values(), *(mark for mark in self._marks[1] if mark is not None)]))
        found = {layer: next(copies).double() for layer in moved}
        marks = [None if mark is None else next(copies) for mark in self._marks[1]]
        self.shuffled = not all(_same(*pair) for pair in zip(self._marks[0], marks, strict=False))
        self._old, self._marks = self._new or self._old, (marks or self._marks[0], [])
        moved = {} if self.shuffled else found
        return {layer: each.square().nanmean(dim=0).sqrt() for layer, each in moved.items()}

    def distances(self, device: torch.device) -> tuple[Tensor, list[str], list[int]]:
        """Return distances of all heads that see the same, ``(samples, heads, heads)``, their layers and their numbers.

        Layers with other keys, rows or masks than most are left out.

        Raises:
            ValueError: If no sample was kept.
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
        if not groups:
            raise ValueError(f"No sample was kept: a row of one takes more than {LAYER_BYTES / 2**20:.0f} MiB a layer.")
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


def _same(before: Tensor | None, now: Tensor | None) -> bool:
    if before is None or now is None:
        return before is now
    return torch.equal(before, now)


def _bytes(kept: _Kept) -> int:
    return 4 * kept.weights.numel()
