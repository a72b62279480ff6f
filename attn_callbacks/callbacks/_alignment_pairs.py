"""A few pairs of sentences whose alignment is drawn: their texts, their gold links and what every head made of them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attn_callbacks.callbacks._alignment_batch import LinkedBatch, LinkedMaps
from attn_callbacks.callbacks._host import to_host
from attn_callbacks.callbacks._writer import BackgroundWriter
from attn_callbacks.functional.alignment import alignment_links
from attn_callbacks.render import Picture
from attn_callbacks.render.alignment import alignment_picture

__all__ = ["Pair", "pairs_of", "word_texts"]


@dataclass(eq=False)
class Pair:
    """One pair of sentences.

    Args:
        number: Its place among the pairs looked at.
        row: Its place in its batch.
        source: Text of each source token (or word), if known.
        target: Text of each target token (or word), if known.
    """

    number: int
    row: int
    source: Sequence[str] | None
    target: Sequence[str] | None
    layers: dict[str, list[Tensor]] = field(default_factory=dict)

    def take(self, layer: str, maps: LinkedMaps, most: int) -> None:
        """Keep what a layer made of the pair, at most ``most`` tokens a side, on its device."""
        row = self.row
        kept = [maps.weights[row, :, :most, :most], maps.query_valid[row, :most], maps.key_valid[row, :most]]
        kept += [gold[row, :most, :most].to(maps.weights.device) for gold in maps[1:3] if gold is not None]
        self.layers[layer] = [tensor.clone() for tensor in kept]  # a view would keep the whole batch alive

    def draw(self, writer: BackgroundWriter, layer: str, head: int, method: str, title: str) -> Future[Picture] | None:
        """Draw one head in the background; ``None`` if it did not see the pair, or nothing of the pair is real."""
        if layer not in self.layers:
            return None
        weights, rows, columns, *gold = self.layers[layer]
        weights, rows, columns, *gold = to_host([weights[head], rows, columns, *gold])
        if not rows.any() or not columns.any():
            return None
        links = alignment_links(weights[None, None], method=method, query_valid=rows[None], key_valid=columns[None])
        shown = [_cut(array, rows, columns) for array in (weights, links[0, 0], *(part.bool() for part in gold))]
        marks = dict(zip(("links", "sure", "possible"), shown[1:], strict=False))
        draw = partial(alignment_picture, shown[0], _labels(self.source, columns), _labels(self.target, rows), **marks)
        return writer.submit(partial(draw, title=f"{title}, pair {self.number}"), shown[0].nbytes)


def pairs_of(texts: Sequence[tuple[Any, Any]], found: LinkedBatch, first: int) -> list[Pair]:
    """Return the pairs that a batch begins with.

    Args:
        texts: Source and target tokens of each.
        found: What else is known of the batch.
        first: Number of the first pair.
    """
    return [
        Pair(
            number=first + row,
            row=row,
            source=_worded(source, found.source_words, row),
            target=_worded(target, found.target_words, row),
        )
        for row, (source, target) in enumerate(texts)
    ]


def word_texts(pieces: Sequence[str], words: Sequence[int]) -> list[str]:
    """Join pieces to words, without the marks of tokenizers.

    Example:
        >>> word_texts(["[CLS]", "play", "##ing", "▁chess"], [-1, 0, 0, 1])
        ['playing', 'chess']
    """
    texts = [""] * (max(words, default=-1) + 1)
    for piece, word in zip(pieces, words, strict=False):
        if word >= 0:
            texts[word] += piece.removeprefix("##").lstrip("▁Ġ").removesuffix("</w>")
    return texts


def _worded(texts: Sequence[str] | None, words: Tensor | None, row: int) -> Sequence[str] | None:
    """Join the texts of pieces; texts that are not as many as pieces are those of words already."""
    if texts is None or words is None or len(texts) != words.shape[1]:
        return texts
    return word_texts(texts, words[row].tolist())


def _cut(array: Tensor, rows: Tensor, columns: Tensor) -> Any:
    return array[rows][:, columns].numpy()


def _labels(texts: Sequence[str] | None, shown: Tensor) -> list[str]:
    """Return the texts at the places that are shown, their numbers where there is no text."""
    places = torch.nonzero(shown)[:, 0].tolist()
    return [str(place) if texts is None else texts[place] if place < len(texts) else "" for place in places]
