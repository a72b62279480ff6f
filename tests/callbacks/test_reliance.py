"""Reliance and candidates, measured on models of which it is known what they rely on."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from attn_callbacks import AttentionGuidance, BatchSchema, BiasMonitor
from tests.callbacks.models import Classifier, TextEncoder, pl, quiet_trainer

SAMPLES, LENGTH = 64, 6


class Words(Dataset[dict[str, Tensor]]):
    """Word 1 is the label and word 4 a shortcut that agrees with it; sorted by class, as folders of files are."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.labels = torch.arange(SAMPLES) // (SAMPLES // 2)
        self.ids = torch.randint(10, 30, (SAMPLES, LENGTH))
        self.ids[:, 1], self.ids[:, 4] = self.labels, self.labels

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        spurious = torch.arange(LENGTH) == 4
        return {"input_ids": self.ids[index], "labels": self.labels[index], "spurious": spurious, "right": ~spurious}


class Reading(pl.LightningModule):
    """Predicts the word at one place."""

    def __init__(self, place: int, forward: str = "ids") -> None:
        super().__init__()
        self.place, self.handed = place, forward
        self.embed = nn.Embedding(30, 2)
        with torch.no_grad():
            self.embed.weight[:2] = 10 * torch.eye(2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.embed(ids)[:, self.place]

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        ids = batch["input_ids"]
        return {"logits": self(ids if self.handed == "ids" else ids.clone())}


def measured(module: Any, folder: Path, data: Any = None, **options: Any) -> BiasMonitor:
    monitor = BiasMonitor(**{"min_support": 5, **options})
    quiet_trainer(folder, [monitor]).validate(module, DataLoader(data or Words(), 8), verbose=False)
    return monitor


def test_what_a_model_reads_is_what_it_relies_on(tmp_path: Path) -> None:
    blind = measured(Reading(1), tmp_path).report.reliance["spurious"]
    assert (blind.support, blind.drop) == (SAMPLES, 0.0)
    reading = measured(Reading(4), tmp_path).report
    reliance = reading.reliance["spurious"]
    assert reliance.before == 1.0
    # another sample has the other class in every second case: batches are not shuffled among themselves alone
    assert reliance.drop == pytest.approx(0.5, abs=0.15)
    assert [finding.key for finding in reading.findings if finding.kind == "feature"] == [("feature", "spurious")]


def test_named_sets_are_measured_like_spurious_ones(tmp_path: Path) -> None:
    schema = BatchSchema(sets={"rest": "right"})
    reliance = measured(Reading(1), tmp_path, schema=schema).report.reliance
    assert reliance["rest"].drop > 0.3
    assert reliance["spurious"].drop == 0.0


def test_no_sample_gets_what_it_had(tmp_path: Path) -> None:
    sets = {f"set {number}": "spurious" for number in range(6)}
    two = Subset(Words(), [0, SAMPLES - 1])
    reliance = measured(Reading(4), tmp_path, two, schema=BatchSchema(sets=sets), min_support=1).report.reliance
    assert [reliance[name].drop for name in sets] == [1.0] * 6  # each gets the other's word


def test_what_runs_again_must_predict_what_the_step_did(tmp_path: Path) -> None:
    class Turned(Reading):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            return {"logits": self(batch["input_ids"]).neg()}

    with pytest.warns(UserWarning, match="cannot measure reliance"):
        report = measured(Turned(4), tmp_path).report
    assert report.reliance == {}


def test_batches_are_spread_over_the_validation(tmp_path: Path) -> None:
    assert measured(Reading(4), tmp_path, reliance_batches=2).report.reliance["spurious"].support == 16
    two = measured(Reading(4), tmp_path, reliance_batches=2).report.reliance["spurious"]
    assert (two.class_support == 8).all()  # one batch of each class
    assert measured(Reading(4), tmp_path, reliance_batches=0).report.reliance == {}


def test_inputs_that_are_changed_on_the_way_are_told_once(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="cannot measure reliance") as caught:
        report = measured(Reading(4, forward="clone"), tmp_path).report
    assert len([w for w in caught if "cannot measure" in str(w.message)]) == 1
    assert report.reliance == {}
    assert int(report.support.sum()) == SAMPLES


def test_a_preparation_is_not_taken_for_the_network(tmp_path: Path) -> None:
    class Prepared(Reading):
        def __init__(self) -> None:
            super().__init__(4)
            self.head = nn.Identity()

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            return {"logits": self.head(self.embed(batch["input_ids"])[:, self.place])}

    with pytest.warns(UserWarning, match="cannot measure reliance"):
        report = measured(Prepared(), tmp_path).report
    assert report.reliance == {}


def test_measuring_leaves_training_as_it_is(tmp_path: Path) -> None:
    class Marked(Words):
        def __getitem__(self, index: int) -> dict[str, Tensor]:
            row = super().__getitem__(index)
            return {**row, "attention_mask": torch.ones(LENGTH), "group": row["labels"]}

    def weights(callbacks: list[Any]) -> dict[str, Tensor]:
        torch.manual_seed(0)
        module = Classifier(TextEncoder(dropout=0.1))
        data = DataLoader(Marked(), 8, shuffle=True), DataLoader(Marked(), 8)
        quiet_trainer(tmp_path, callbacks, max_epochs=2).fit(module, *data)
        return module.state_dict()

    monitor = BiasMonitor()
    watched, plain = weights([monitor]), weights([])
    assert all(torch.equal(value, plain[name]) for name, value in watched.items())
    assert monitor.report.reliance["spurious"].support == SAMPLES
    assert monitor.report.candidates is not None


class Looking(pl.LightningModule):
    """Errs where word 7 stands, and looks at it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 8)
        self.attention = nn.MultiheadAttention(8, 1, batch_first=True)
        with torch.no_grad():
            self.embed.weight.normal_(0, 0.1)
            self.embed.weight[7] = 4.0
            self.attention.in_proj_weight.copy_(torch.eye(8).repeat(3, 1))

    def forward(self, ids: Tensor) -> Tensor:
        tokens = self.embed(ids)
        self.attention(tokens, tokens, tokens, need_weights=False)
        return 10.0 * nn.functional.one_hot((ids == 7).any(dim=1).long(), 2)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return {"logits": self(batch["input_ids"])}


class Triggered(Dataset[dict[str, Tensor]]):
    """All of class 0; a fifth holds word 7."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.ids = torch.randint(10, 30, (200, LENGTH))
        self.ids[::5, 3] = 7

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": torch.tensor(0)}


class Names:
    """A tokenizer that knows names."""

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f"word{number}" for number in ids]


@pytest.mark.parametrize(("tokenizer", "name"), [(None, "token 7"), (Names(), "token 'word7'")])
def test_a_token_that_goes_with_errors_is_found_without_annotation(tokenizer: Any, name: str, tmp_path: Path) -> None:
    report = measured(Looking(), tmp_path, Triggered(), reliance_batches=100, tokenizer=tokenizer).report
    found = [finding for finding in report.findings if finding.kind == "feature"]
    assert found
    assert all(name in finding.where for finding in found)
    assert found[0].answers == ()
    assert any("sample 0" in evidence for evidence in found[0].evidence)


def test_places_of_pictures_are_named_by_row_and_column(tmp_path: Path) -> None:
    from tests.callbacks.models import Vit, pair_loader

    monitor = BiasMonitor(min_support=2)
    quiet_trainer(tmp_path, [monitor]).validate(Classifier(Vit()), pair_loader(32, images=True), verbose=False)
    names = {monitor._sensor._names.namer(None, 4097)(number) for number in (0, 1, 6)}
    assert names == {"class token", "patch in row 0, column 0", "patch in row 1, column 1"}


def test_without_attention_or_marks_nothing_is_said(tmp_path: Path) -> None:
    class Plain(Words):
        def __getitem__(self, index: int) -> dict[str, Tensor]:
            row = super().__getitem__(index)
            return {name: row[name] for name in ("input_ids", "labels")}

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = measured(Reading(1), tmp_path, Plain()).report
    assert [str(w.message) for w in caught if "BiasMonitor" in str(w.message)] == []
    assert report.accuracy == 1.0


def test_an_error_in_the_measurement_keeps_the_report(tmp_path: Path) -> None:
    class Failing(Reading):
        calls = 0

        def forward(self, ids: Tensor) -> Tensor:
            Failing.calls += 1
            if Failing.calls > 10:
                raise RuntimeError("no more")
            return super().forward(ids)

    with pytest.warns(UserWarning, match="The measurement of reliance by `BiasMonitor` is switched off.*no more"):
        report = measured(Failing(4), tmp_path).report
    assert int(report.support.sum()) == SAMPLES


class Marked(Words):
    """With marks of a shape to choose."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape = shape

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {**super().__getitem__(index), "spurious": torch.ones(self.shape, dtype=torch.bool)}


def test_marks_that_lie_on_no_attention_are_told_once(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Attention on 'spurious' tokens is not measured.*shape") as caught:
        report = measured(Looking(), tmp_path, Marked(4)).report
    assert len([w for w in caught if "is not measured" in str(w.message)]) == 1
    assert report.attention == {}


class Pictures(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Pictures with marks on pixels."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(index)
        pixels = torch.zeros(16, 16, dtype=torch.bool)
        pixels[:4, :10] = True  # two patches, and half a third
        return torch.rand(3, 16, 16), torch.tensor(index % 2), pixels


def test_marks_on_pixels_are_measured_in_attention_and_in_reliance(tmp_path: Path) -> None:
    from tests.callbacks.models import Vit

    report = measured(Classifier(Vit()), tmp_path, Pictures(), schema=BatchSchema(spurious=2)).report
    share = report.attention["spurious"]
    assert (share.mass / share.lift).tolist() == pytest.approx([2 / 17, 2 / 17], rel=1e-4)
    assert report.reliance["spurious"].support == 32


def test_guidance_keeps_attention_off_marked_pixels(tmp_path: Path) -> None:
    from tests.callbacks.models import Vit

    torch.manual_seed(0)
    module, schema = Classifier(Vit()), BatchSchema(spurious=2)
    monitor = BiasMonitor(schema, feedback=[AttentionGuidance(coefficient=10.0, control=False)])
    quiet_trainer(tmp_path, [monitor], max_epochs=8).fit(module, DataLoader(Pictures(), 8), DataLoader(Pictures(), 8))
    assert float(monitor.report.attention["spurious"].mass.max()) < 0.02  # of 2 patches in 17


@pytest.mark.parametrize("field", ["target", "group"])
def test_names_in_place_of_numbers_are_told_in_a_sentence(field: str, tmp_path: Path) -> None:
    schema = BatchSchema(**{field: lambda batch: ["cat"] * len(batch["labels"])})
    with pytest.warns(UserWarning, match=rf"`{field}` must hold one number a sample, got \['cat'.*names.index"):
        measured(Reading(1), tmp_path, schema=schema)


def test_a_network_that_draws_numbers_in_evaluation_draws_the_same_ones(tmp_path: Path) -> None:
    class Drawing(Reading):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) + 0 * torch.rand(1)

    def state_after(callbacks: list[Any]) -> Tensor:
        torch.manual_seed(0)
        quiet_trainer(tmp_path, callbacks).validate(Drawing(4), DataLoader(Words(), 8), verbose=False)
        return torch.get_rng_state()

    assert torch.equal(state_after([]), state_after([BiasMonitor(min_support=5)]))


def test_nothing_of_a_validation_is_kept(tmp_path: Path) -> None:
    monitor = measured(Reading(4), tmp_path)
    assert monitor.report.reliance["spurious"].support == SAMPLES
    assert monitor._sensor._probe is None
    assert monitor._sensor._sums._metrics == {}


def test_two_monitors_of_two_loaders_keep_apart(tmp_path: Path) -> None:
    from tests.callbacks.models import csv_logger

    monitors = [BiasMonitor(min_support=5), BiasMonitor(min_support=5, dataloader="other")]

    class Both(Classifier):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return {"logits": self(batch)}

    class Grouped(Words):
        def __getitem__(self, index: int) -> dict[str, Tensor]:
            row = super().__getitem__(index)
            return {**row, "attention_mask": torch.ones(LENGTH), "group": row["labels"]}

    trainer = quiet_trainer(tmp_path, monitors, logger=csv_logger(tmp_path))
    half = torch.utils.data.Subset(Grouped(), range(0, SAMPLES, 2))
    loaders = {"first": DataLoader(Grouped(), 8), "other": DataLoader(half, 8)}
    trainer.fit(Both(), DataLoader(Grouped(), 8), loaders)
    assert [int(monitor.report.support.sum()) for monitor in monitors] == [SAMPLES, SAMPLES // 2]
    names = {path.name for path in (tmp_path / "run" / "attention").iterdir()}
    assert {"bias.jsonl", "ledger.jsonl", "bias_other.jsonl", "ledger_other.jsonl"} <= names
    assert {"bias/accuracy", "bias/worst_cell_recall", "bias/other/accuracy"} <= set(trainer.callback_metrics)
