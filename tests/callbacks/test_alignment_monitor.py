"""AlignmentMonitor against loops over the weights that a model of our own hands out, and what it logs of them."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from attn_callbacks import BatchSchema
from attn_callbacks.callbacks import _alignment_pairs
from attn_callbacks.callbacks._alignment_batch import _READ, LinkedMaps, LinkReader
from attn_callbacks.callbacks._alignment_pairs import Pair
from attn_callbacks.callbacks._alignment_sums import AlignmentSums
from attn_callbacks.callbacks.alignment_monitor import AlignmentMonitor
from attn_callbacks.functional.alignment_shape import ALIGNMENT_QUANTITIES
from tests.callbacks.board import events
from tests.callbacks.models import Classifier, board_logger, csv_logger, fit, leftovers, loader, pl, quiet_trainer
from tests.functional import alignment_reference as reference

SAMPLES, TARGET, SOURCE, WIDTH, HEADS, WORDS = 14, 7, 6, 16, 2, 30
LAYERS = ("net.layers.0", "net.layers.1")


class Pairs(Dataset[dict[str, Any]]):
    """Pairs of padded sentences with random gold links, texts, and two pieces a word on both sides."""

    def __init__(self, samples: int = SAMPLES, seed: int = 1) -> None:
        source = torch.Generator().manual_seed(seed)

        def drawn(*shape: int, below: int = WORDS) -> Tensor:
            return torch.randint(1, below, (samples, *shape), generator=source)

        self.columns = {"source": drawn(SOURCE), "target": drawn(TARGET)}
        lengths = drawn(below=SOURCE - 2)[:, None] + 2, drawn(below=TARGET - 2)[:, None] + 2
        self.columns["source_valid"] = torch.arange(SOURCE) < lengths[0]
        self.columns["target_valid"] = torch.arange(TARGET) < lengths[1]
        self.columns["sure"], self.columns["possible"] = (
            torch.rand(samples, TARGET, SOURCE, generator=source) < share for share in (0.2, 0.2)
        )
        self.columns["source_words"] = (torch.arange(SOURCE) // 2).expand(samples, -1)
        self.columns["target_words"] = (torch.arange(TARGET) // 2 - 1).expand(samples, -1)  # two special tokens first
        self.columns["word_links"] = self.columns["sure"][:, :3, :3]

    def __len__(self) -> int:
        return len(self.columns["sure"])

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: column[index] for name, column in self.columns.items()}


def pairs(samples: int = SAMPLES, seed: int = 1) -> DataLoader[dict[str, Any]]:
    return DataLoader(Pairs(samples, seed), 4)


class Decoder(nn.Module):
    """Two cross-attentions that hand out their own weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True) for _ in range(2))
        self.own = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.head, self.drop = nn.Linear(WIDTH, WORDS), nn.Dropout(0.1)

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
        memory, state = 3 * self.embed(batch["source"]), 3 * self.embed(batch["target"])
        maps = []
        state = state + self.own(state, state, state)[0]
        for layer in self.layers:
            mixed, weights = layer(
                state, memory, memory, key_padding_mask=~batch["source_valid"], average_attn_weights=False
            )
            state = state + self.drop(mixed)
            maps.append(weights)
        return self.head(state), maps


class Translation(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Decoder()
        self.kept: list[tuple[dict[str, Any], list[Tensor]]] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch)[0].flatten(0, 1), batch["target"].flatten())

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.kept.append((batch, self.net(batch)[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-2)


def run(folder: Path, *others: Any, epochs: int = 1, log: Any = csv_logger, **options: Any) -> Any:
    torch.manual_seed(0)
    monitor, module = AlignmentMonitor(**options), Translation()
    trainer = quiet_trainer(
        folder, [monitor, *others], logger=log(folder), max_epochs=epochs, enable_checkpointing=bool(others)
    )
    fit(module, trainer, pairs(8, seed=0), pairs())
    assert leftovers(module) == {}
    return monitor, module, trainer


GOLD = {"sure": "sure", "possible": "possible", "target_valid": "target_valid"}


def loops(module: Translation, mutual: bool = False) -> np.ndarray:
    """``(samples, layers, heads, quantities, 2)`` of the last validation."""
    found = []
    for batch, maps in module.kept:
        for row in range(len(batch["sure"])):
            gold = [batch[name][row].numpy() for name in ("sure", "possible", "target_valid", "source_valid")]
            found.append(
                [[list(reference.ratios(head.double().numpy(), *gold, mutual).values()) for head in layer[row]]
                 for layer in maps]
            )  # fmt: skip
    return np.array(found)


@pytest.mark.parametrize("method", ["argmax", "mutual"])
def test_every_quantity_matches_loops(method: str, tmp_path: Path) -> None:
    monitor, module, _ = run(tmp_path, **GOLD, method=method)
    x, y = np.moveaxis(loops(module, method == "mutual").sum(axis=0), -1, 0)
    np.testing.assert_allclose(monitor.result.mean, x / y, rtol=1e-4)
    assert monitor.result.layer_names == LAYERS
    assert int(monitor.result.samples.max()) == SAMPLES


def test_words_are_compared_with_links_between_words(tmp_path: Path) -> None:
    names = {"source_words": "source_words", "target_words": "target_words", "target_valid": "target_valid"}
    monitor, module, _ = run(tmp_path, sure="word_links", **names)
    found = []
    for batch, maps in module.kept:
        for row in range(len(batch["sure"])):
            rows, columns = batch["target_valid"][row], batch["source_valid"][row]
            pieces = [[t for t in range(TARGET) if t // 2 - 1 == word and rows[t]] for word in range(3)]
            origins = [[s for s in range(SOURCE) if s // 2 == word and columns[s]] for word in range(3)]
            words = np.zeros((2, HEADS, 3, 3))
            for t, s in np.ndindex(3, 3):
                if pieces[t]:
                    part = torch.stack([layer[row] for layer in maps])[:, :, pieces[t]][..., origins[s]]
                    words[..., t, s] = part.sum(dim=-1).mean(dim=-1)
            gold = batch["word_links"][row].numpy()
            real = np.array([bool(part) for part in pieces]), np.array([bool(part) for part in origins])
            found.append(
                [[list(reference.ratios(head, gold, gold, *real).values()) for head in layer] for layer in words]
            )
    x, y = np.moveaxis(np.array(found).sum(axis=0), -1, 0)
    np.testing.assert_allclose(monitor.result.mean, x / y, rtol=1e-4)


def test_numbers_of_the_best_head_are_monitored(tmp_path: Path) -> None:
    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path / "best", monitor="alignment/error_rate")
    stopping = pl.callbacks.EarlyStopping("alignment/error_rate", patience=5)
    monitor, _, trainer = run(tmp_path, checkpoint, stopping, epochs=2, log=board_logger, **GOLD)
    errors = monitor.result.quantity("error_rate")
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    best = np.unravel_index(int(errors.argmin()), errors.shape)
    for name in ("error_rate", "precision", "recall"):
        assert metrics[f"alignment/{name}"] == pytest.approx(float(monitor.result.quantity(name)[best]), abs=1e-6)
    assert metrics["alignment/error_rate_layer"] == pytest.approx(float(errors.mean(dim=1).min()), abs=1e-6)
    coverage = float(monitor.result.quantity("coverage").mean())
    assert metrics["alignment/coverage_mean"] == pytest.approx(coverage, abs=1e-6)
    board = events(tmp_path / "board")
    assert {*metrics} <= {*board.Tags()["scalars"]}
    pictures = {f"alignment/heads/{name}" for name in ALIGNMENT_QUANTITIES} | {f"alignment/pair_{n}" for n in range(4)}
    assert pictures == set(board.Tags()["images"])
    assert checkpoint.best_model_path


def test_table_has_everything(tmp_path: Path) -> None:
    monitor, *_ = run(tmp_path, epochs=2, **GOLD)
    with (tmp_path / "run" / "attention" / "alignment.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["epoch"] for row in rows} == {"0", "1"}
    assert len(rows) == 2 * 2 * HEADS * len(ALIGNMENT_QUANTITIES)
    last = {(row["layer"], row["head"], row["quantity"]): row for row in rows if row["epoch"] == "1"}
    recall = last[LAYERS[1], "1", "recall"]
    index = ALIGNMENT_QUANTITIES.index("recall")
    assert float(recall["value"]) == pytest.approx(float(monitor.result.mean[1, 1, index]))
    assert float(recall["standard_error"]) == pytest.approx(float(monitor.result.standard_error[1, 1, index]))


def test_without_gold_links_the_shape_is_told(tmp_path: Path) -> None:
    monitor, _, trainer = run(tmp_path, target_valid="target_valid")
    assert monitor.result.quantity("error_rate").isnan().all()
    assert not monitor.result.quantity("monotonicity").isnan().any()
    assert {name for name in trainer.callback_metrics if name.startswith("alignment/")} == {
        f"alignment/{name}_mean" for name in ("monotonicity", "coverage", "coverage_deviation", "confidence")
    }
    names = {path.name for path in (tmp_path / "run" / "alignment").glob("**/*.png")}
    assert "pair_0_step2.png" in names
    assert not any("error_rate" in name for name in names)


def test_training_is_bit_identical(tmp_path: Path) -> None:
    _, watched, _ = run(tmp_path / "watched", epochs=2, **GOLD)
    torch.manual_seed(0)
    AlignmentMonitor()
    plain = Translation()
    fit(plain, quiet_trainer(tmp_path / "plain", max_epochs=2), pairs(8, seed=0), pairs())
    for name, value in plain.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name])


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What pictures of pairs were asked for."""
    asked: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    original = _alignment_pairs.alignment_picture

    def picture(*args: Any, **marks: Any) -> Any:
        asked.append((args, marks))
        return original(*args, **marks)

    monkeypatch.setattr(_alignment_pairs, "alignment_picture", picture)
    return asked


def test_pairs_are_drawn_as_the_best_head_sees_them(drawn: Any, tmp_path: Path) -> None:
    monitor, module, _ = run(tmp_path, schema=BatchSchema(tokens="source"), target_tokens="target", samples=6, **GOLD)
    layer, head = monitor.result.best_head()
    assert len(drawn) == 6  # from two batches of four
    for number, ((weights, source, target), marks) in enumerate(drawn):
        batch, maps = module.kept[number // 4]
        row = number % 4
        rows, columns = batch["target_valid"][row], batch["source_valid"][row]
        np.testing.assert_allclose(weights, maps[layer][row, head][rows][:, columns], atol=1e-6)
        assert source == [str(word) for word in batch["source"][row][columns].tolist()]
        assert target == [str(word) for word in batch["target"][row][rows].tolist()]
        for name in ("sure", "possible"):
            assert (marks[name] == batch[name][row][rows][:, columns].numpy()).all()
        assert (marks["links"].argmax(axis=1) == weights.argmax(axis=1)).all()
        assert marks["title"] == f"{LAYERS[layer]}, head {head}, epoch 0, pair {number}"


def test_words_are_drawn_as_words(drawn: Any, tmp_path: Path) -> None:
    class Named(Pairs):
        def __getitem__(self, index: int) -> dict[str, Any]:
            return {**super().__getitem__(index), "target_text": "one two three"}

    class Tokenizer:
        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return [f"{'##' * (place % 2)}{number}" for place, number in enumerate(ids)]

    names = {"source_words": "source_words", "target_words": "target_words", "sure": "word_links"}
    texts = {"target_tokens": lambda batch: [text.split() for text in batch["target_text"]]}
    monitor = AlignmentMonitor(BatchSchema(tokens="source"), samples=1, **names, **texts)
    module = Translation()
    module.tokenizer = Tokenizer()
    trainer = quiet_trainer(tmp_path, [monitor], logger=csv_logger(tmp_path))
    fit(module, trainer, pairs(8), DataLoader(Named(4), 4))
    (weights, source, target), _ = drawn[0]
    batch = module.kept[0][0]
    pieces = batch["source"][0][batch["source_valid"][0]].tolist()
    joined = ["".join(map(str, pieces[start : start + 2])) for start in range(0, len(pieces), 2)]
    assert source == joined
    assert target == ["one", "two", "three"][: len(weights)]


def test_long_sentences_are_cut_in_pictures_only(drawn: Any, tmp_path: Path) -> None:
    monitor, *_ = run(tmp_path, max_tokens=2, **GOLD)
    assert all(weights.shape[0] <= 2 and weights.shape[1] <= 2 for (weights, _, _), _ in drawn)
    whole, *_ = run(tmp_path / "whole", **GOLD)
    assert torch.equal(monitor.result.mean, whole.result.mean)


def test_self_attention_is_left_aside_unless_asked_for(tmp_path: Path) -> None:
    monitor, *_ = run(tmp_path, cross_only=False, layers=["net.own", "net.layers.1"])
    assert monitor.result.layer_names == ("net.own", "net.layers.1")


def test_a_model_without_cross_attention_is_told_once(tmp_path: Path) -> None:
    monitor = AlignmentMonitor()
    trainer = quiet_trainer(tmp_path, [monitor], logger=csv_logger(tmp_path), max_epochs=2)
    with pytest.warns(UserWarning, match="saw no cross-attention") as caught:
        fit(Classifier(), trainer)
    assert len([warning for warning in caught if "saw no cross-attention" in str(warning.message)]) == 1
    assert monitor.result is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sure": lambda batch: batch["sure"].mT}, r"`sure` must have shape \(batch, queries, keys\) = \(4, 7, 6\)"),
        ({"sure": "links"}, "`sure` reads 'links' of the batch"),
        ({"target_valid": "source_valid"}, r"`target_valid` must have shape \(batch, tokens\) = \(4, 7\)"),
        ({"layers": ["decoder"]}, "`layers` names no attention module"),
    ],
)
def test_what_does_not_fit_ends_watching_and_not_training(options: Any, message: str, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=f"`AlignmentMonitor` is switched off .*{message}"):
        monitor, _, trainer = run(tmp_path, **options)
    assert monitor.result is None
    assert trainer.global_step == 2


def test_every_n_epochs_repeats_the_last_value(tmp_path: Path) -> None:
    monitor, _, trainer = run(tmp_path, epochs=3, every_n_epochs=2, **GOLD)
    errors = monitor.result.quantity("error_rate")
    assert float(trainer.callback_metrics["alignment/error_rate"]) == pytest.approx(float(errors.min()), abs=1e-6)
    lines = (tmp_path / "run" / "attention" / "alignment.csv").read_text().splitlines()[1:]
    assert {line.split(",")[0] for line in lines} == {"1"}


def test_what_is_monitored_goes_on_without_a_logger(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    stopping = pl.callbacks.EarlyStopping("alignment/confidence_mean", patience=5)
    monitor = AlignmentMonitor(**GOLD)
    trainer = quiet_trainer(tmp_path, [monitor, stopping], max_epochs=2)
    submitted: list[Any] = []
    monitor._writer.submit = lambda *job: submitted.append(job)
    fit(Translation(), trainer, pairs(8, seed=0), pairs())
    confidence = float(monitor.result.quantity("confidence").mean())
    assert float(trainer.callback_metrics["alignment/confidence_mean"]) == pytest.approx(confidence, abs=1e-6)
    assert trainer.current_epoch == 2
    assert submitted == []
    assert not list(tmp_path.iterdir())
    assert not [warning for warning in recwarn if "AlignmentMonitor" in str(warning.message)]


def test_what_was_not_measured_is_unknown_and_not_the_last_value(tmp_path: Path) -> None:
    monitored: list[float] = []

    class Told(pl.Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            monitored.append(float(trainer.callback_metrics["alignment/error_rate"]))

    def sure(batch: Any) -> Tensor:
        if monitored:
            raise RuntimeError("no links any more")
        return batch["sure"]

    with pytest.warns(UserWarning, match="`AlignmentMonitor` is switched off .*no links any more"):
        run(tmp_path, Told(), epochs=3, sure=sure)
    assert monitored[0] == monitored[0]
    assert np.isnan(monitored[1:]).all()
    assert len(monitored) == 3


def test_another_run_begins_without_a_result(tmp_path: Path) -> None:
    monitor, *_ = run(tmp_path)
    assert monitor.result is not None
    with pytest.warns(UserWarning, match="saw no cross-attention"):
        fit(Classifier(), quiet_trainer(tmp_path / "other", [monitor], logger=csv_logger(tmp_path / "other")))
    assert monitor.result is None


@pytest.mark.parametrize("fails", ["sure", "forward"])
def test_other_processes_are_told_why_this_one_failed(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str | None] = []
    original = AlignmentSums.conclude

    def conclude(sums: AlignmentSums, device: Any, *, failure: str | None) -> Any:
        told.append(failure)
        return original(sums, device, failure=failure)

    monkeypatch.setattr(AlignmentSums, "conclude", conclude)
    wrong = {"sure": {"sure": "links"}, "forward": {"sure": lambda batch: batch["sure"].mT}}[fails]
    with pytest.warns(UserWarning, match="`AlignmentMonitor` is switched off"):
        run(tmp_path, epochs=2, **wrong)
    assert len(told) == 2
    assert all("`sure`" in failure for failure in told if failure is not None)
    assert None not in told


def test_source_tokens_that_may_not_be_linked_are_left_out(tmp_path: Path) -> None:
    def fewer(batch: dict[str, Any]) -> Tensor:
        return batch["source_valid"] & (torch.arange(SOURCE) > 0)

    monitor, module, _ = run(tmp_path, source_valid=fewer, **GOLD)
    for batch, _ in module.kept:
        batch["source_valid"] = fewer(batch)
    x, y = np.moveaxis(loops(module).sum(axis=0), -1, 0)
    np.testing.assert_allclose(monitor.result.mean, x / y, rtol=1e-4)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ({"labels": torch.tensor([[0, 3, -100]])}, [[True, True, False]]),  # 0 is a token like any other
        ({"labels": torch.ones(1, 2), "decoder_attention_mask": torch.tensor([[1, 0]])}, [[True, False]]),
        ({"labels": torch.tensor([0, 3])}, None),
        ((torch.tensor([[0, 3]]), torch.tensor([1])), None),
    ],
)
def test_labels_tell_which_target_tokens_are_real(batch: Any, expected: list[list[bool]] | None) -> None:
    found = LinkReader(BatchSchema(), None, **dict.fromkeys(_READ)).read(batch).usual_valid
    assert (None if found is None else found.tolist()) == expected


def test_a_pair_keeps_nothing_of_its_batch_alive() -> None:
    weights, gold = torch.rand(8, 2, 5, 6), torch.ones(8, 5, 6, dtype=torch.bool)
    rows, columns = torch.ones(8, 5, dtype=torch.bool), torch.ones(8, 6, dtype=torch.bool)
    pair = Pair(0, 3, None, None)
    pair.take("layer", LinkedMaps(weights, gold, gold, rows, columns), 4)
    for kept in pair.layers["layer"]:
        assert kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()


def test_a_tokenizer_that_is_not_ready_ends_nothing(tmp_path: Path) -> None:
    class Unready(Translation):
        @property
        def tokenizer(self) -> Any:
            raise RuntimeError("prepare the data first")

    monitor = AlignmentMonitor(**GOLD)
    quiet_trainer(tmp_path, [monitor], logger=csv_logger(tmp_path)).validate(Unready(), pairs(), verbose=False)
    assert monitor.result is not None


def test_validate_returns_the_numbers(tmp_path: Path) -> None:
    monitor = AlignmentMonitor(**GOLD)
    trainer = quiet_trainer(tmp_path, [monitor], logger=csv_logger(tmp_path))
    (found,) = trainer.validate(Translation(), pairs(), verbose=False)
    assert found["alignment/error_rate"] == pytest.approx(float(monitor.result.quantity("error_rate").min()), abs=1e-6)


def test_hugging_face_batches_need_no_names(drawn: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": WORDS,
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "max_position_embeddings": 32,
    }
    parts = {f"{side}_{kind}": 2 if kind == "attention_heads" else 16 for side in ("encoder", "decoder")
             for kind in ("attention_heads", "ffn_dim")}  # fmt: skip

    class Bart(Classifier):
        def __init__(self) -> None:
            super().__init__(nn.Linear(1, 1))
            self.net = transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes, **parts))

        def loss(self, batch: Any) -> Tensor:
            return self.net(**batch).loss

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        labels = stacked["target"].where(stacked["target_valid"], -100)
        mask = stacked["source_valid"].long()
        return {"input_ids": stacked["source"], "attention_mask": mask, "labels": labels}

    data, monitor = DataLoader(Pairs(8), 4, collate_fn=collate), AlignmentMonitor(samples=1)
    fit(Bart(), quiet_trainer(tmp_path, [monitor], logger=csv_logger(tmp_path)), data, data)
    assert monitor.result.layer_names == ("net.model.decoder.layers.0.encoder_attn",)
    (weights, source, target), _ = drawn[0]
    first = next(iter(data))
    assert source == [str(word) for word in first["input_ids"][0][first["attention_mask"][0] > 0].tolist()]
    assert target == [str(word) for word in first["labels"][0][first["labels"][0] >= 0].tolist()]
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-5)


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="`possible` needs `sure`"):
        AlignmentMonitor(possible="possible")
    with pytest.raises(ValueError, match="`method` must be one of 'argmax', 'mutual', got 'best'"):
        AlignmentMonitor(method="best")
    with pytest.raises(TypeError, match="`sure` must be a key, a position or a function of the batch"):
        AlignmentMonitor(sure=[1])
    with pytest.raises(TypeError, match="`layers` must be a list of names"):
        AlignmentMonitor(layers="decoder")
    with pytest.raises(ValueError, match="`samples` must be at least 0"):
        AlignmentMonitor(samples=-1)


def test_no_pictures_of_pairs_on_request(tmp_path: Path) -> None:
    run(tmp_path, samples=0, **GOLD)
    assert not list(tmp_path.glob("**/pair_*.png"))
    assert list(tmp_path.glob("**/error_rate*.png"))


def test_loader_of_single_label_batches_is_no_pair(tmp_path: Path) -> None:
    monitor = AlignmentMonitor(cross_only=False)
    fit(Classifier(), quiet_trainer(tmp_path, [monitor], logger=csv_logger(tmp_path)), validation=loader(8))
    assert monitor.result is not None
