from __future__ import annotations

import json

import numpy as np
import pytest

from examples.results import Result, save, story, table

PLAIN = [Result(0.75, {"a": 0.5, "b": 1.0}), Result(0.85, {"a": 0.7, "b": 1.0})]


def test_worst_group():
    assert PLAIN[0].worst_group == 0.5


def test_table_shows_mean_and_standard_error():
    header, row = table({"plain": PLAIN}).splitlines()
    assert header.split() == ["accuracy", "worst", "group", "a", "b"]
    assert " ".join(row.split()) == "plain 0.800 ± 0.050 0.600 ± 0.100 0.600 ± 0.100 1.000 ± 0.000"


def test_table_of_one_seed_has_no_errors():
    assert "±" not in table({"plain": PLAIN[:1]})


def test_story_names_the_worst_and_what_was_fed_back():
    decisions = [{"feedback": "Weights", "action": "more of b"}]
    entry = {"epoch": 1, "step": 20, "accuracy": 0.9, "gap": 0.25, "worst_class_recall": 0.7, "decisions": decisions}
    first, second = story([entry]).splitlines()
    assert first.strip() == "epoch 1, step  20: accuracy 0.90, worst class recall 0.70, gap 0.25"
    assert second.strip() == "Weights: more of b"
    assert "worst group accuracy 0.60" in story([{**entry, "worst_group_accuracy": 0.6}])


def test_saved_file(tmp_path):
    save(tmp_path / "runs" / "results.json", {"plain": PLAIN, "suite": PLAIN[:1]}, range(2))
    content = json.loads((tmp_path / "runs" / "results.json").read_text())
    assert set(content) == {"plain", "suite", "seeds"}
    assert content["seeds"] == [0, 1]
    worst = [0.5, 0.7]
    assert content["plain"]["worst_group"] == pytest.approx(np.mean(worst))
    assert content["plain"]["worst_group_standard_error"] == pytest.approx(np.std(worst, ddof=1) / np.sqrt(2))
    assert content["plain"]["groups"] == pytest.approx({"a": 0.6, "b": 1.0})
    assert content["suite"]["worst_group_standard_error"] is None
