"""HeadRoles: hand-made heads get their labels, changes are told once, drift is what it should be, training the same."""

from __future__ import annotations

import csv
import math
import sys
import warnings
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from attn_callbacks import AttentionRecorder, BatchSchema
from attn_callbacks.callbacks import _roles_memory
from attn_callbacks.callbacks._roles_memory import HeadMemory
from attn_callbacks.callbacks._roles_sums import RoleSums
from attn_callbacks.callbacks.head_roles import HeadRoles
from attn_callbacks.functional.patterns import PatternScores
from attn_callbacks.functional.role_labels import ROLE_LABELS
from attn_callbacks.functional.roles import ROLES, head_roles
from attn_callbacks.metrics.roles import HeadRolesMetric
from tests.callbacks.models import (
    HEADS,
    LAYERS,
    LENGTH,
    VOCABULARY,
    WIDTH,
    Bert,
    Classifier,
    EncoderDecoder,
    TextEncoder,
    Texts,
    Vit,
    board_logger,
    csv_logger,
    encoder,
    fit,
    leftovers,
    loader,
    pair_loader,
    pl,
    quiet_trainer,
)

PLANS = {
    "previous": 60 * torch.eye(LENGTH).roll(-1, dims=-1),
    "uniform": torch.zeros(LENGTH, LENGTH),
    "sink": 60 * F.one_hot(torch.zeros(LENGTH, dtype=torch.long), LENGTH).float(),
    "mixed": 2.5 * F.one_hot(torch.zeros(LENGTH, dtype=torch.long), LENGTH).float(),
}


class Planted(TextEncoder):
    """Heads whose scores are set by hand; ``plan`` may be changed at any time."""

    def __init__(self, *plan: str) -> None:
        super().__init__()
        self.plan = plan

    def hidden(self, tokens: Tensor, padding: Tensor | None) -> Tensor:
        scores = torch.stack([PLANS[name] for name in self.plan])
        keys = torch.eye(LENGTH).expand(len(tokens), len(self.plan), -1, -1)
        mask = None if padding is None else ~padding[:, None, None]
        F.scaled_dot_product_attention(scores.expand(len(tokens), -1, -1, -1), keys, keys, attn_mask=mask, scale=1.0)
        return self.embed(tokens)


class Schedule(Classifier):
    """Changes the plan from epoch to epoch."""

    def __init__(self, *plans: tuple[str, ...]) -> None:
        super().__init__(Planted(*plans[0]))
        self.plans = plans

    def on_train_epoch_start(self) -> None:
        self.net.plan = self.plans[self.current_epoch]


def run(module: Any, folder: Path, epochs: int = 1, validation: Any = None, **options: Any) -> HeadRoles:
    callback = HeadRoles(**options)
    trainer = quiet_trainer(folder, [callback], logger=csv_logger(folder), max_epochs=epochs)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*HeadRoles")
        fit(module, trainer, loader(8), validation or loader(16, seed=1))
    assert leftovers(module) == {}
    return callback


def pictures(folder: Path) -> set[str]:
    return {str(path.relative_to(folder / "run")) for path in folder.glob("**/*.png")}


def test_hand_made_heads_get_their_labels(tmp_path: Path) -> None:
    roles = run(Classifier(Planted("previous", "uniform", "sink")), tmp_path)
    assert roles.result.names() == [["previous", "uniform", "sink"]]
    assert roles.result.wins.sum() == 16 * 3
    assert roles.result.layer_names == ("net",)
    assert pictures(tmp_path) == {f"roles/{name}_step1.png" for name in ("labels", "clusters", "cluster_layout")}
    (entry,) = roles.timeline
    assert entry["labels"] == roles.result.names()
    assert roles.changes == []


def test_scores_are_those_of_the_functions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, special, separator = Classifier(Bert(), lr=0.05), [0, 2, 4], [4]
    roles = run(module, tmp_path, 2, special=special, separator=separator)
    metric, data = HeadRolesMetric(LAYERS, HEADS), Texts(16, seed=1)
    valid = data.attention_mask.bool()
    marks = [torch.isin(data.input_ids, torch.tensor(ids)) for ids in (special, separator)]
    with torch.no_grad(), AttentionRecorder(module.net.eval()) as recorder:
        module.net({"input_ids": data.input_ids, "attention_mask": data.attention_mask})
    for layer, call in enumerate(recorder.calls):
        scores = head_roles(
            call.weights(), data.input_ids, special=marks[0], separator=marks[1], valid=valid, key_valid=valid
        )
        metric.update(layer, scores)
    expected = metric.compute()
    torch.testing.assert_close(roles.result.score, expected.score, rtol=1e-4, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(roles.result.chance, expected.chance, rtol=1e-4, atol=1e-6, equal_nan=True)
    assert torch.equal(roles.result.wins, expected.wins)
    for name in ("separator", "special", "duplicate", "induction", "block"):
        assert not roles.result.score[..., ROLES.index(name)].isnan().any()
    assert (tmp_path / "run" / "metrics.csv").read_text().count("roles/special") == 1


def test_special_tokens_are_those_of_the_tokenizer(tmp_path: Path) -> None:
    class Words:
        all_special_ids, sep_token_id = [2, 3], 3

    module = Classifier(Planted("sink"))
    module.tokenizer = Words()
    found = run(module, tmp_path / "known").result
    module = Classifier(Planted("sink"))
    given = run(module, tmp_path / "given", special=[2, 3], separator=[3]).result
    torch.testing.assert_close(found.score, given.score, equal_nan=True)
    assert not found.score[..., ROLES.index("special")].isnan().any()
    nothing = run(Classifier(Planted("sink")), tmp_path / "none").result
    assert nothing.score[..., ROLES.index("special")].isnan().all()


def test_sampled_rows_are_placed_where_they_belong(tmp_path: Path) -> None:
    roles = run(Classifier(Planted("previous", "uniform", "sink")), tmp_path, rows=4)
    assert roles.result.names() == [["previous", "uniform", "sink"]]
    assert float(roles.result.score[0, 0, ROLES.index("previous")]) == pytest.approx(1.0, abs=1e-6)


def test_a_change_is_told_once_in_its_epoch(tmp_path: Path) -> None:
    plans = [("sink", "uniform"), ("sink", "uniform"), ("previous", "uniform"), ("previous", "uniform")]
    roles = run(Schedule(*plans), tmp_path, 4)
    (change,) = roles.changes
    assert (change.epoch, change.head, change.before, change.after) == (2, 0, "sink", "previous")
    assert str(change) == "net head 0 became a previous-token head (1.00, was sink)"
    assert [entry["epoch"] for entry in roles.timeline] == [0, 1, 2, 3]
    drawn = {name for name in pictures(tmp_path) if "timeline" in name}
    assert drawn == {"roles/timeline_step3.png", "roles/timeline_step4.png"}


def test_labels_that_are_not_sure_are_no_change(tmp_path: Path) -> None:
    """The strength of ``mixed`` is just above the threshold of a sink: not sure, and not what it was before."""
    plans = [("previous",), ("mixed",), ("previous",), ("mixed",), ("sink",)]
    (change,) = (roles := run(Schedule(*plans), tmp_path, 5, margin=0.4)).changes
    labels = [entry["labels"][0][0] for entry in roles.timeline]
    assert labels[1] != "previous"
    assert (change.epoch, change.before, change.after) == (4, "previous", "sink")
    assert len(run(Schedule(*plans), tmp_path / "lax", 5, margin=0.0).changes) > 1


def test_changes_are_told_as_text(tmp_path: Path) -> None:
    roles = HeadRoles(clusters=False)
    logger = board_logger(tmp_path)
    told: list[tuple[str, str, int]] = []
    logger.experiment.add_text = lambda tag, text, step: told.append((tag, text, step))
    module = Schedule(("sink",), ("uniform",))
    fit(module, quiet_trainer(tmp_path, [roles], logger=logger, max_epochs=2), loader(8), loader(8))
    assert told == [("roles/changes", f"- epoch 1: net head 0 became a uniform head ({1:.2f}, was sink)", 2)]


def test_changes_that_are_not_sure_are_counted_in_the_text(tmp_path: Path) -> None:
    roles, logger = HeadRoles(clusters=False, margin=0.4), board_logger(tmp_path)
    told: list[str] = []
    logger.experiment.add_text = lambda tag, text, step: told.append(text)
    module = Schedule(("previous", "sink"), ("mixed", "sink"), ("previous", "previous"))
    fit(module, quiet_trainer(tmp_path, [roles], logger=logger, max_epochs=3), loader(8), loader(8))
    assert roles.timeline[1]["labels"][0][0] != "previous"
    sure = f"- epoch 2: net head 1 became a previous-token head ({1:.2f}, was sink)"
    assert told == ["- labels that differ from the last look without being sure: 1", sure]


@pytest.mark.parametrize("clusters", [2, 3])
def test_a_number_of_clusters_may_be_given(clusters: int, tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    roles = run(Classifier(Planted("previous", "uniform", "sink", "sink")), tmp_path, clusters=clusters)
    assert roles.head_clusters is not None
    assert roles.head_clusters.clusters == clusters
    assert roles.head_clusters.labels[0, 2] == roles.head_clusters.labels[0, 3]


def test_the_timeline_continues_after_a_checkpoint(tmp_path: Path) -> None:
    plans = [("sink",), ("sink",), ("previous",)]
    first = HeadRoles()
    trainer = quiet_trainer(tmp_path, [first], logger=csv_logger(tmp_path), max_epochs=2)
    fit(Schedule(*plans), trainer, loader(8), loader(8))
    trainer.save_checkpoint(tmp_path / "at.ckpt")
    second = HeadRoles()
    trainer = quiet_trainer(tmp_path, [second], logger=csv_logger(tmp_path), max_epochs=3)
    fit(Schedule(*plans), trainer, loader(8), loader(8), ckpt_path=str(tmp_path / "at.ckpt"), weights_only=True)
    assert [entry["epoch"] for entry in second.timeline] == [0, 1, 2]
    assert [(change.epoch, change.before) for change in second.changes] == [(2, "sink")]
    assert second.drift.isnan().all()  # the maps are not in the checkpoint


def test_a_second_fit_starts_a_timeline_of_its_own(tmp_path: Path) -> None:
    roles = HeadRoles()
    for name in ("one", "two"):
        trainer = quiet_trainer(tmp_path / name, [roles], logger=csv_logger(tmp_path / name))
        fit(Classifier(), trainer, loader(8), loader(8))
        assert len(roles.timeline) == 1
    trainer = quiet_trainer(tmp_path / "three", [roles], logger=csv_logger(tmp_path / "three"))
    (logged,) = trainer.validate(Classifier(), loader(8), verbose=False)
    assert set(logged) == {"val_loss", "roles/short_range_mass", "roles/long_range_mass"}
    assert len(roles.timeline) == 1


# --- drift -------------------------------------------------------------------------------------------------------


def test_a_frozen_model_does_not_drift_and_another_does(tmp_path: Path) -> None:
    still = run(Classifier(Bert(dropout=0.1), lr=0.0), tmp_path / "still", 2)
    assert torch.equal(still.drift, torch.zeros(LAYERS, HEADS, dtype=torch.float64))
    moving = run(Classifier(Bert(dropout=0.1), lr=1e-4), tmp_path / "moving", 2)
    assert (moving.drift > 0).all()
    assert (moving.drift < 0.01).all()


@pytest.mark.parametrize("batch_size", [16, 3])
def test_drift_by_hand(batch_size: int, tmp_path: Path) -> None:
    """From the first to the previous token: the first two rows stay, all others move as far as can be."""
    data = loader(16, seed=1, batch_size=batch_size)
    roles = run(Schedule(("sink", "uniform"), ("previous", "uniform")), tmp_path, 2, data, drift_samples=7)
    lengths = Texts(16, seed=1).attention_mask[:7].sum(dim=1).tolist()
    # row 0 has no previous token that is real, or its last one where nothing is padded
    moved = [((n - 2) + (n == LENGTH)) / n for n in lengths]
    uniform_first = sum(n < LENGTH for n in lengths)
    assert uniform_first  # there is padding
    free = [0.0 if n == LENGTH else _half_uniform(n) for n in lengths]
    expected = math.sqrt(sum(m + f / n for m, f, n in zip(moved, free, lengths, strict=True)) / 7)
    assert roles.drift[0].tolist() == pytest.approx([expected, 0.0], abs=1e-6)
    rows = list(csv.DictReader((tmp_path / "run" / "attention" / "head_roles.csv").open()))
    assert [row["label"] for row in rows] == ["sink", "uniform", "previous", "uniform"]
    assert [row["drift"] for row in rows[:2]] == ["", ""]
    assert float(rows[2]["drift"]) == pytest.approx(expected, abs=1e-6)


def _half_uniform(n: int) -> float:
    """Divergence in bits between the first key alone and all ``n`` alike, which is row 0 where its key is padding."""
    return 1 - (math.log(1 + 1 / n) + math.log(n + 1) / n) / (2 * math.log(2))


def test_long_sequences_keep_some_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_roles_memory, "LAYER_BYTES", 8 * HEADS * LENGTH * 4 * 3)  # three rows of eight samples
    sizes: list[tuple[int, ...]] = []
    alone = _roles_memory._Kept.alone
    monkeypatch.setattr(
        _roles_memory._Kept, "alone", lambda kept: sizes.append(tuple(kept.weights.shape)) or alone(kept)
    )
    roles = run(Classifier(Bert(), lr=0.01), tmp_path, 2)
    assert set(sizes) == {(8, HEADS, 3, LENGTH)}
    assert (roles.drift > 0).all()


def test_a_shuffled_loader_has_no_fixed_samples(tmp_path: Path) -> None:
    roles = HeadRoles()
    trainer = quiet_trainer(tmp_path, [roles], logger=csv_logger(tmp_path), max_epochs=3)
    with pytest.warns(UserWarning, match="`HeadRoles` knows no drift: the validation loader gives other") as caught:
        fit(Classifier(), trainer, loader(8), DataLoader(Texts(32), 8, shuffle=True))
    assert len([warning for warning in caught if "no drift" in str(warning.message)]) == 1
    assert roles.drift.isnan().all()
    assert len(roles.timeline) == 3


def test_no_samples_no_drift_and_no_clusters(tmp_path: Path) -> None:
    roles = run(Classifier(), tmp_path, 2, drift_samples=0)
    assert roles.drift.isnan().all()
    assert roles.head_clusters is None
    assert "roles/clusters" not in "".join(pictures(tmp_path))


def test_numbers_can_be_monitored(tmp_path: Path) -> None:
    roles = HeadRoles(every_n_epochs=2)
    stopping = pl.callbacks.EarlyStopping("roles/drift", mode="max", patience=9)
    trainer = quiet_trainer(tmp_path, [roles, stopping], logger=csv_logger(tmp_path), max_epochs=4)
    fit(Classifier(Bert(), lr=0.01), trainer, loader(8), loader(8))
    assert trainer.current_epoch == 4
    assert float(trainer.callback_metrics["roles/drift"]) == pytest.approx(float(roles.drift.mean()), rel=1e-5)
    local = roles.result.score[..., ROLES.index("local")].mean()
    assert float(trainer.callback_metrics["roles/short_range_mass"]) == pytest.approx(float(local), rel=1e-5)


# --- clusters and the probe --------------------------------------------------------------------------------------


def test_heads_that_look_alike_are_redundant(tmp_path: Path) -> None:
    roles = run(Classifier(Planted("previous", "sink", "previous", "sink")), tmp_path, 2)
    found = roles.head_clusters
    assert found.labels.tolist() == [[0, 1, 0, 1]]
    assert [(pair.first, pair.second) for pair in found.redundant] == [((0, 0), (0, 2)), ((0, 1), (0, 3))]
    assert "roles/cluster_agreement" in (tmp_path / "run" / "metrics.csv").read_text()


def test_without_scipy_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    roles = HeadRoles()
    trainer = quiet_trainer(tmp_path, [roles], logger=csv_logger(tmp_path), max_epochs=3)
    with pytest.warns(UserWarning, match="leaves clusters out: they need scipy") as caught:
        fit(Classifier(), trainer, loader(8), loader(8))
    assert len([warning for warning in caught if "HeadRoles" in str(warning.message)]) == 1
    assert roles.head_clusters is None
    assert len(roles.timeline) == 3


class Speaker(Classifier):
    """Its ``forward`` takes ids."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), encoder(0.1), nn.Linear(WIDTH, 2))

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch["input_ids"])[:, 0], batch["labels"])


def test_the_probe_runs_only_if_asked(tmp_path: Path) -> None:
    assert run(Speaker(), tmp_path / "off").probe is None
    roles = run(Speaker(), tmp_path / "on", probe_vocabulary=VOCABULARY)
    assert roles.probe.score.shape == (LAYERS, HEADS, 3)
    assert "roles/probe/induction_step1.png" in pictures(tmp_path / "on")
    assert roles._guard.off is False


def test_a_module_that_takes_no_ids_is_told_and_goes_on(tmp_path: Path) -> None:
    roles = HeadRoles(probe_vocabulary=VOCABULARY)
    trainer = quiet_trainer(tmp_path, [roles], logger=csv_logger(tmp_path), max_epochs=2)
    with pytest.warns(UserWarning, match="The probe of `HeadRoles` is switched off for the rest") as caught:
        fit(Classifier(Bert()), trainer, loader(8), loader(8))
    assert len([warning for warning in caught if "HeadRoles" in str(warning.message)]) == 1
    assert len(roles.timeline) == 2
    assert roles.head_clusters is not None


# --- other models ------------------------------------------------------------------------------------------------


def test_patches_have_rows_and_columns(tmp_path: Path) -> None:
    data = pair_loader(16, images=True)
    roles = HeadRoles()
    trainer = quiet_trainer(tmp_path, [roles], logger=csv_logger(tmp_path))
    fit(Classifier(Vit()), trainer, data, data)
    found, given = roles.result, HeadRoles(grid=[4, 4, 1])
    for name in ("row", "column", "class_gather"):
        assert not found.score[..., ROLES.index(name)].isnan().any()
    assert repr(given) == "HeadRoles(grid=(4, 4, 1))"


def test_cross_attention_keeps_what_is_about_keys(tmp_path: Path) -> None:
    roles = HeadRoles()
    trainer = quiet_trainer(tmp_path, [roles], logger=csv_logger(tmp_path), max_epochs=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*HeadRoles")
        fit(Classifier(EncoderDecoder()), trainer, pair_loader(16), pair_loader(16))
    layer = next(n for n, name in enumerate(roles.result.layer_names) if "multihead" in name)
    defined = {name for name, value in zip(ROLES, roles.result.score[layer, 0].tolist(), strict=True) if value == value}
    assert defined == {"sink", "vertical", "uniform"}
    assert not roles.drift.isnan().any()
    assert set(roles.head_clusters.layer_names) < set(roles.result.layer_names)


def test_windows_of_a_sample_count_once() -> None:
    from attn_callbacks.callbacks._roles_batch import scores_of_samples

    torch.manual_seed(0)
    each = head_roles(torch.rand(6, 2, 9, 9).softmax(-1))
    whole = scores_of_samples(each, 3)
    for field, averaged in zip(each, whole, strict=True):
        torch.testing.assert_close(averaged[1], (field[2] + field[3]) / 2, equal_nan=True)
    assert scores_of_samples(each, None) is each


def test_a_schema_that_does_not_fit_ends_nothing(tmp_path: Path) -> None:
    roles = HeadRoles(BatchSchema(tokens="words"))
    trainer = quiet_trainer(tmp_path, [roles], logger=csv_logger(tmp_path), max_epochs=2)
    with pytest.warns(UserWarning, match="`HeadRoles` is switched off.*`tokens` reads 'words'"):
        fit(Classifier(), trainer)
    assert trainer.current_epoch == 2
    assert roles.result is None


# --- training stays as it is -------------------------------------------------------------------------------------


def test_training_is_bit_identical(tmp_path: Path) -> None:
    def trained(callbacks: list[Any], name: str) -> dict[str, Tensor]:
        torch.manual_seed(3)
        module, folder = Speaker(), tmp_path / name
        trainer = quiet_trainer(folder, callbacks, logger=csv_logger(folder), max_epochs=2, val_check_interval=0.5)
        fit(module, trainer, DataLoader(Texts(32), 8, shuffle=True), loader(16, seed=1))
        return {**module.state_dict(), "draw": torch.rand(3)}

    roles = HeadRoles(rows=4, probe_vocabulary=VOCABULARY)
    plain, watched = trained([], "plain"), trained([roles], "watched")
    assert len(roles.timeline) == 4
    assert {name for name, value in plain.items() if not torch.equal(value, watched[name])} == set()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rows": 1}, ValueError, "`rows` must be at least 2"),
        ({"margin": 2.0}, ValueError, "`margin` must lie between 0.0 and 1.0"),
        ({"grid": [4, 4]}, ValueError, r"`grid` must be \(rows, columns, prefix\), got \[4, 4\]"),
        ({"special": 101}, TypeError, r"`special` must be a list of numbers, got 101. Pass \[101\]"),
        ({"layers": "encoder"}, TypeError, "`layers` must be a list of names"),
        ({"drift_samples": -1}, ValueError, "`drift_samples` must be at least 0"),
        ({"probe_vocabulary": 8}, ValueError, "`probe_vocabulary` must be at least 32"),
    ],
)
def test_arguments_are_checked(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        HeadRoles(**options)


# --- several processes -------------------------------------------------------------------------------------------


def some_scores(seed: int, samples: int) -> PatternScores:
    generator = torch.Generator().manual_seed(seed)
    return head_roles(torch.rand(samples, 3, 9, 9, generator=generator).mul(5).softmax(-1))


def one_of_two(rank: int, folder: str) -> None:
    from torch import distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    sums, device = RoleSums(2), torch.device("cpu")
    sums.add("first", some_scores(rank, 4 + rank))
    if rank:
        sums.add("second", some_scores(7, 2))
    drift = {} if rank else {"first": torch.tensor([0.1, 0.2, 0.3])}
    torch.save(sums.conclude(device, drift, failure=None), f"{folder}/{rank}.pt")
    failed = ""
    try:
        sums.conclude(device, {}, failure="ValueError: no" if rank else None)
    except RuntimeError as error:
        failed = str(error)
    assert failed == "A process could not measure all of its data. ValueError: no"
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.ddp
def test_two_processes_conclude_what_one_does(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    (one, first), (other, second) = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    alone = RoleSums()
    for layer, seed, samples in (("first", 0, 4), ("first", 1, 5), ("second", 7, 2)):
        alone.add(layer, some_scores(seed, samples))
    expected, _ = alone.conclude(torch.device("cpu"), {}, failure=None)
    for found in (one, other):
        assert found.layer_names == expected.layer_names == ("first", "second")
        assert torch.equal(found.wins, expected.wins)
        torch.testing.assert_close(found.strength_error, expected.strength_error, equal_nan=True)
    torch.testing.assert_close(first, second, equal_nan=True)
    assert first[0].tolist() == [0.1, 0.2, 0.3] or first[0].tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert first[1].isnan().all()


# --- a pretrained model ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_pretrained_model_has_its_known_heads(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    data = pytest.importorskip("examples.sentiment_data")
    try:
        path, sentences = data.minilm(), [each.text for each in data.sentence_splits().test[:48]]
    except (FileNotFoundError, PackageNotFoundError):
        pytest.skip("MiniLM or the sentences are not installed")

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
            self.net = transformers.AutoModel.from_pretrained(path, local_files_only=True)
            self.head = nn.Linear(self.net.config.hidden_size, 2)

        def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return self.head(self.net(ids, attention_mask).last_hidden_state[:, 0])

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch["input_ids"], batch["attention_mask"]), batch["labels"])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self(batch["input_ids"], batch["attention_mask"])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), 2e-5)

    module = Module()

    def collate(texts: list[str]) -> dict[str, Tensor]:
        encoded = module.tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
        return {**encoded, "labels": torch.zeros(len(texts), dtype=torch.long)}

    batches = DataLoader(sentences, 16, collate_fn=collate)
    roles = HeadRoles(probe_vocabulary=20_000)
    trainer = quiet_trainer(tmp_path, [roles], logger=csv_logger(tmp_path), max_epochs=2, limit_train_batches=1)
    fit(module, trainer, batches, batches)
    names = roles.result.names()
    assert names[0][2] == "previous"
    assert names[1][8] == "next"
    assert sum(name == "sink" for layer in names for name in layer) >= 30
    assert all(name in ROLE_LABELS for layer in names for name in layer)
    assert ((roles.drift > 0) & (roles.drift < 0.3)).all()
    assert len(roles.head_clusters.heads) == 72
    assert roles.head_clusters.redundant
    assert float(roles.probe.strength[0, 2, 2]) > 0.9  # the previous-token head
    assert not [change for change in roles.changes if change.margin < 0.1]


def test_memory_starts_empty() -> None:
    memory = HeadMemory(4)
    assert memory.drift() == {}
    assert memory.shuffled is False
