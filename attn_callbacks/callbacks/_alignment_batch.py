"""What a batch says about the alignment of its pairs: gold links, which tokens count, words, and texts."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attn_callbacks.batch import BatchSchema
from attn_callbacks.callbacks._samples import read_samples
from attn_callbacks.capture import AttentionCall
from attn_callbacks.functional.words import word_maps

__all__ = ["LinkReader", "LinkedBatch", "LinkedMaps"]

_READ = ("sure", "possible", "target_valid", "source_valid", "target_words", "source_words")


class LinkedMaps(NamedTuple):
    """Attention between what gold links are between, and gold links: arguments of ``AlignmentMetric.update``."""

    weights: Tensor
    sure: Tensor | None
    possible: Tensor | None
    query_valid: Tensor
    key_valid: Tensor


class LinkedBatch(NamedTuple):
    """What :class:`LinkReader` found; each part may be missing."""

    sure: Tensor | None
    possible: Tensor | None
    target_valid: Tensor | None
    source_valid: Tensor | None
    target_words: Tensor | None
    source_words: Tensor | None
    usual_valid: Tensor | None

    def maps(self, call: AttentionCall) -> LinkedMaps:
        """Return the attention of a call between words (without word numbers: tokens) and what is known of them."""
        queries, keys = call.query_valid, call.key_valid
        if self.target_valid is None and self.usual_valid is not None and self.usual_valid.shape == queries.shape:
            queries = queries & self.usual_valid.to(call.device)
        queries = _and(queries, "target_valid", self.target_valid)
        keys = _and(keys, "source_valid", self.source_valid)
        weights = call.weights()
        if self.target_words is None and self.source_words is None:
            return LinkedMaps(weights, self.sure, self.possible, queries, keys)
        rows, columns = (weights if self.sure is None else self.sure).shape[-2:]
        words = word_maps(
            weights,
            self.target_words,
            self.source_words,
            query_valid=queries,
            key_valid=keys,
            sizes=(rows, columns),
        )
        return LinkedMaps(words.weights, self.sure, self.possible, words.query_valid, words.key_valid)


class LinkReader:
    """Reads gold links, and what goes with them, from batches.

    Args:
        schema: Where a batch has what.
        target_tokens: Where it has the target tokens, ids or texts.
        readers: Where it has the parts of :class:`LinkedBatch`.
    """

    def __init__(self, schema: BatchSchema, target_tokens: Any, **readers: Any) -> None:
        self._source = schema
        self._links = BatchSchema(sets=readers)
        self._target = BatchSchema(tokens=target_tokens)
        self._named_target = target_tokens is not None

    def read(self, batch: Any) -> LinkedBatch:
        """Return what a batch holds."""
        found = {name: self._links.read(name, batch) for name in _READ}
        parts = {name: None if part is None else torch.as_tensor(part) for name, part in found.items()}
        return LinkedBatch(**parts, usual_valid=_usual_targets(batch))

    def texts(self, batch: Any, tokenizer: Any, most: int) -> list[tuple[_Texts, _Texts]]:
        """Return source and target tokens of the first pairs of a batch, as far as they are known."""
        source = [sample.tokens for sample in read_samples(self._source, batch, tokenizer, most)]
        schema = self._target if self._named_target else BatchSchema(tokens=_usual_labels)
        known = schema.read("tokens", batch) is not None
        target = [sample.tokens for sample in read_samples(schema, batch, tokenizer, most)] if known else []
        return list(zip_longest(source, target[: len(source)]))


_Texts = tuple[str, ...] | None


def _and(valid: Tensor, name: str, given: Tensor | None) -> Tensor:
    if given is None:
        return valid
    if given.shape != valid.shape:
        raise ValueError(f"`{name}` must have shape (batch, tokens) = {tuple(valid.shape)}, got {tuple(given.shape)}.")
    return valid & given.to(valid.device).bool()


def _usual_targets(batch: Any) -> Tensor | None:
    """Which target tokens are real, where a batch is one of Hugging Face's."""
    if not isinstance(batch, Mapping):
        return None
    mask, labels = batch.get("decoder_attention_mask"), batch.get("labels")
    if isinstance(mask, Tensor):
        return mask.bool()
    return labels >= 0 if isinstance(labels, Tensor) and labels.ndim == 2 else None


def _usual_labels(batch: Any) -> Tensor | None:
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    return labels.clamp_min(0) if isinstance(labels, Tensor) and labels.ndim == 2 else None
