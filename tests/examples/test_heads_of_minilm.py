from __future__ import annotations

import io
import json
import random
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from attn_callbacks.functional.role_labels import ROLE_LABELS
from attn_callbacks.render.roles import role_colours
from examples import heads_of_minilm, sentiment
from examples.heads_page import CELL, HEAD, LABEL
from examples.heads_picture import draw_page
from examples.heads_report import analysis_seconds, report
from examples.sentiment_data import Sentence, Splits

GOOD, BAD, OTHER = ("good", "fine", "great"), ("bad", "poor", "awful"), ("film", "day", "food", "the", "a", "was", "so")


def made_up(count, seed):
    """Sentences with one telling word each."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        words = [draw.choice(OTHER) for _ in range(draw.randint(3, 7))]
        words.insert(draw.randrange(len(words)), draw.choice(GOOD if number % 2 else BAD))
        rows.append(Sentence(" ".join(words), number % 2, number % 4))
    return rows


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Everything that the example finds about a random BERT of 2 layers with 3 heads, and what it prints."""
    pytest.importorskip("scipy")
    folder = tmp_path_factory.mktemp("heads")
    words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *OTHER)
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    size = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32}
    torch.manual_seed(0)
    settings = transformers.BertConfig(vocab_size=len(words), initializer_range=0.5, **size)
    transformers.BertModel(settings).save_pretrained(folder)
    splits = Splits(made_up(48, 0), made_up(16, 1), made_up(16, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sentiment, "minilm", lambda: folder)
        patch.setattr(heads_of_minilm, "sentence_splits", lambda *args, **kwargs: splits)
        patch.setattr(heads_of_minilm, "RUNS", folder / "runs")
        printed = io.StringIO()
        patch.setattr("sys.stdout", printed)
        return heads_of_minilm.main(), printed.getvalue(), folder / "runs"


def test_heads_are_the_pretrained_ones_after_the_first_epoch(ran):
    found, _, _ = ran
    first, second, _ = found.looks
    assert found.roles.timeline[0]["epoch"] == 0
    assert first.ablation is not None
    assert second.ablation is None
    assert not torch.equal(first.study.importance.importance, second.study.importance.importance)


def test_encoder_is_frozen_only_at_first(ran):
    model = heads_of_minilm.Classifier.__new__(heads_of_minilm.Classifier)
    torch.nn.Module.__init__(model)
    model.model = torch.nn.Module()
    model.model.base_model = torch.nn.Module()
    model.model.base_model.encoder = torch.nn.Linear(2, 2)
    for epoch, trains in ((0, False), (1, True)):
        model._fabric = None
        model._trainer = SimpleNamespace(current_epoch=epoch)
        model.on_train_epoch_start()
        assert model.model.base_model.encoder.weight.requires_grad is trains


def test_numbers_are_those_of_a_model_without_the_head(ran):
    found, _, _ = ran
    look = found.looks[-1]
    assert look.study.importance.samples == 16
    assert look.ablation.loss == pytest.approx(look.study.importance.loss, rel=1e-4)
    assert found.pairs.change.flatten().tolist() == pytest.approx(look.ablation.change.flatten().tolist(), abs=1e-5)


def test_every_part_is_told(ran):
    _, printed, _ = ran
    for title in ("Epoch by epoch", "Roles before", "Roles after", "changed their role", "Clusters", "most important"):
        assert title in printed
    assert re.search(r"one whole analysis of 6 heads: \d+ s \(\d+ s of the processor\) on \d+ thread", printed)
    assert len(re.findall(r"^\d\.\d \d\.\d ", printed, re.MULTILINE)) >= 1
    rows = printed.split("== Roles after ==")[1].split("==")[0].strip().splitlines()[1:]
    assert sum(int(row.split()[1]) for row in rows) == 6


def test_most_important_heads_come_first(ran):
    found, _, _ = ran
    rows = report(found, rise=0.02).split("most important heads")[1].split("== What")[0].splitlines()[2:-2]
    sizes = [float(row.split()[2]) for row in rows if row]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == pytest.approx(float(found.looks[-1].study.importance.importance.max()), abs=1e-4)


def test_analysis_time_leaves_training_and_checks_out(ran):
    found, _, _ = ran
    assert set(found.seconds) >= {"ablation", "interactions of all pairs", "checks"}
    expected = [sum(pair[side] for name, pair in found.seconds.items() if name != "checks") for side in (0, 1)]
    assert analysis_seconds(found) == pytest.approx(expected)


def test_files_and_tags(ran):
    _, _, folder = ran
    with Image.open(folder / "heads.png") as page:
        assert page.size[0] > 1000
    numbers = json.loads((folder / "heads.json").read_text())
    assert len(numbers["looks"]) == len(numbers["timeline"]) == 3
    assert list((folder / "tensorboard").rglob("events*"))


def test_page_shows_the_role_of_each_head_in_its_cell(ran):
    found, _, _ = ran
    page = draw_page(found).rgb()
    label = int(found.looks[0].roles.labels().label[0, 0])
    sure = float(found.looks[0].roles.labels().confidence[0, 0]) >= 0.1
    colour = role_colours(np.array(label), ROLE_LABELS).astype(int)
    expected = colour if sure else (colour + 2 * 255) // 3
    region = page[: 200 + HEAD, 12 + LABEL : 12 + LABEL + CELL[1]]
    assert (region == expected.astype(np.uint8)).all(axis=-1).sum() > CELL[0] * CELL[1] // 3


@pytest.mark.parametrize("removed", ["none", "one", "several"])
def test_heads_that_can_go_are_counted(ran, removed):
    found, _, _ = ran
    nothing = torch.full((2, 3), torch.nan)
    ablation = replace(found.looks[0].ablation, change=nothing, standard_error=nothing, sets=(), loss=0.5)
    if removed == "one":
        ablation = replace(ablation, change=nothing.index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(0.25)))
    if removed == "several":
        ablation = replace(
            ablation, sets=((("a", 0), ("b", 1)),), set_change=torch.tensor([0.5]), set_error=torch.ones(1)
        )
    told = found._replace(removed=None if removed == "none" else ablation).removed_together()
    assert told[:2] == {"none": (0, 0.0), "one": (1, 0.25), "several": (2, 0.5)}[removed]


def test_missing_data_is_told_in_a_sentence(monkeypatch):
    def absent():
        raise FileNotFoundError("the package `x`, which carries the data, is not installed")

    monkeypatch.setattr(heads_of_minilm, "minilm", absent)
    with pytest.raises(SystemExit, match=r"No heads to read: the package `x`.*requirements-data"):
        heads_of_minilm.run()


@pytest.mark.slow
def test_minilm(tmp_path, monkeypatch, capsys):
    try:
        heads_of_minilm.minilm(), heads_of_minilm.sentence_splits(0)
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    monkeypatch.setattr(heads_of_minilm, "RUNS", tmp_path)
    found = heads_of_minilm.main()
    printed = capsys.readouterr().out
    before = found.looks[0].roles.names()
    assert before[0][2] == "previous"
    assert before[1][8] == "next"
    assert sum(name == "sink" for row in before for name in row) > 30
    assert found.looks[-1].accuracy > max(0.8, found.looks[0].accuracy)
    assert "one whole analysis of 72 heads" in printed
    assert found.removed_together()[0] >= 5
