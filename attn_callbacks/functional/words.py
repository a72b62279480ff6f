"""Attention between words, from attention between the pieces that a tokenizer cut them into."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attn_callbacks._checks import check_axes
from attn_callbacks.functional._precision import full_precision

__all__ = ["WordMaps", "word_maps"]


class WordMaps(NamedTuple):
    """Attention between words.

    Args:
        weights: ``(batch, heads, target words, source words)``, float32.
        query_valid: ``True`` for target words that exist, ``(batch, target words)``.
        key_valid: ``True`` for source words that exist, ``(batch, source words)``.
    """

    weights: Tensor
    query_valid: Tensor
    key_valid: Tensor


def word_maps(
    weights: Tensor,
    target_words: Tensor | None = None,
    source_words: Tensor | None = None,
    *,
    query_valid: Tensor | None = None,
    key_valid: Tensor | None = None,
    sizes: tuple[int, int] | None = None,
) -> WordMaps:
    """Turn attention between pieces into attention between words.

    What a piece pays to a word is the sum over the word's pieces; what a word pays is the mean over its own pieces. So
    rows still sum to one, less what went to tokens of no word, such as the end of the sentence. Gold links are between
    words: compare them with this. Two matrix products.

    Args:
        weights: Attention weights between pieces.
        target_words: Number of the word of each query piece, from 0; ``-1`` for special tokens, which are of no word.
            ``None``: every query is a word.
        source_words: The same for the keys.
        query_valid: ``True`` for query pieces that count; padding is of no word. ``None`` means all.
        key_valid: ``True`` for key pieces that count.
        sizes: Numbers of target and source words, such as those of the gold links; ``None`` takes the largest that
            occur, for which an accelerator has to be waited for.

    Shape:
        - weights: ``(batch, heads, queries, keys)``
        - target_words, query_valid: ``(batch, queries)``
        - source_words, key_valid: ``(batch, keys)``

    Raises:
        ValueError: If a shape does not fit or (checked on the CPU only) the number of a word is not below its size.

    Example:
        >>> weights = torch.tensor([[[[0.5, 0.25, 0.25], [0.0, 0.5, 0.5]]]])
        >>> word_maps(weights, torch.tensor([[0, 0]]), torch.tensor([[0, 0, 1]])).weights
        tensor([[[[0.6250, 0.3750]]]])

    References:
        Zenkel, Wuebker and DeNero, "Adding Interpretable Attention to Neural Translation Models Improves Word
        Alignment", 2019 (word alignments from sub-words).
    """
    check_axes("weights", weights, 4)
    batch, _, queries, keys = weights.shape
    rows, columns = sizes if sizes is not None else (None, None)
    target = _membership("target_words", target_words, query_valid, (batch, queries), rows, weights.device)
    source = _membership("source_words", source_words, key_valid, (batch, keys), columns, weights.device)
    pieces = target.sum(dim=1)  # (batch, target words)
    share = target / pieces.clamp_min(1)[:, None]
    counted = target.any(dim=2)[:, None, :, None] & source.any(dim=2)[:, None, None]  # NaN times zero is NaN
    with full_precision(weights.device):
        paid = torch.einsum("bhqk,bks->bhqs", weights.float().where(counted, 0.0), source)
        found = torch.einsum("bqt,bhqs->bhts", share, paid)
    return WordMaps(found, pieces > 0, source.any(dim=1))


def _membership(
    name: str,
    words: Tensor | None,
    valid: Tensor | None,
    shape: tuple[int, int],
    size: int | None,
    device: torch.device,
) -> Tensor:
    """Return 1 where a piece is of a word, ``(batch, pieces, words)``, float32."""
    if words is None:
        if size not in (None, shape[1]):
            raise ValueError(f"`{name}` is None: all {shape[1]} tokens are words, but `sizes` says {size}.")
        words = torch.arange(shape[1], device=device).expand(shape)
    mask = "query_valid" if name == "target_words" else "key_valid"
    for label, tensor in ((name, words), (mask, valid)):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"`{label}` must have shape (batch, tokens) = {shape}, got {tuple(tensor.shape)}.")
    words = words.to(device)
    if valid is not None:
        words = words.where(valid.to(device).bool(), -1)
    if size is None:
        size = int(words.max()) + 1 if words.numel() else 0
    elif words.device.type == "cpu" and words.numel() and int(words.max()) >= size:
        raise ValueError(f"`{name}` must number words below {size}, got {int(words.max())}.")
    return (words[..., None] == torch.arange(size, device=device)).float()
