"""ErrorAnalysis: which samples count, what is exchanged when, and what nobody would get."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_callbacks.batch import BatchSchema
from attn_callbacks.callbacks import _error_exchange, _error_gallery, _error_sums
from attn_callbacks.callbacks._class_labels import class_labels
from attn_callbacks.callbacks._error_exchange import count_samples
from attn_callbacks.callbacks._error_gallery import worst_of_all
from attn_callbacks.callbacks._error_outcome import read_outcome
from attn_callbacks.callbacks._writer import BackgroundWriter
from attn_callbacks.callbacks.error_analysis import ErrorAnalysis
from tests.callbacks.models import Classifier, fit, loader, quiet_trainer
from tests.callbacks.test_error_analysis import LAYER, SAMPLES, Fixed, Planted, analysed, planted_data


def changed(folder: Path, name: str, value: Any, places: list[int], **options: Any) -> Any:
    """What is found where some samples have another value."""
    data, _ = planted_data()
    for place, row in enumerate(data.dataset):
        row["labels"] = row["labels"].double()
        row[name] = torch.as_tensor(value, dtype=row[name].dtype).expand_as(row[name]) if place in places else row[name]
    analysis = ErrorAnalysis(BatchSchema(sets={"first": "first"}), samples=5, **options)
    quiet_trainer(folder, [analysis]).validate(Fixed(Planted(True)), data, verbose=False)
    assert analysis.result is not None
    return analysis.result


@pytest.mark.parametrize(
    ("label", "got"), [(2, "2"), (7, "7"), (0.5, "0.5"), (-0.5, "-0.5"), (math.nan, "values from nan to nan")]
)
def test_labels_that_are_no_class_are_left_out_and_told(label: float, got: str, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no class") as heard:
        found = changed(tmp_path, "labels", label, [3, 40, 200])
    said = [str(each.message) for each in heard if "labels" in str(each.message)]
    assert said == [
        f"`ErrorAnalysis` left out 3 samples whose labels are no class: got {got}. Labels must be whole numbers from 0 "
        "to 1, one for each of the 2 logits, or negative for samples that do not count."
    ]
    expected = changed(tmp_path, "labels", -100, [3, 40, 200])
    assert torch.equal(found.samples, expected.samples)
    assert int(found.samples.sum()) == SAMPLES - 3
    torch.testing.assert_close(found.mean, expected.mean, equal_nan=True)
    assert [each.number for each in found.worst] == [each.number for each in expected.worst]


def test_labels_are_read_without_waiting_for_the_device() -> None:
    """A tensor without values has none to wait for."""
    batch = {"labels": torch.empty(4, device="meta")}
    outcome = read_outcome(BatchSchema(), torch.empty(4, 3, device="meta"), batch)
    counts = count_samples(outcome.target, outcome.right, outcome.classes, outcome.strangers)
    assert [each.shape for each in counts.plus(counts)] == [(3, 2), (3,)]
    assert class_labels(torch.empty(0), 2)[1].tolist() == [0.0, math.inf, -math.inf]


def test_labels_that_are_no_class_are_told_once(tmp_path: Path) -> None:
    def target(batch: dict[str, Tensor]) -> Tensor:
        return torch.cat([torch.tensor([2, 9]), batch["labels"][2:]])

    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        fit(Classifier(), quiet_trainer(tmp_path, [ErrorAnalysis(BatchSchema(target=target))], max_epochs=3))
    said = [str(each.message) for each in heard if "no class" in str(each.message)]
    assert len(said) == 1
    assert "left out 4 samples whose labels are no class: got values from 2 to 9." in said[0]


def test_logits_that_are_not_finite_do_not_count(tmp_path: Path) -> None:
    found = changed(tmp_path, "scores", math.nan, [0, 1, 2])
    assert int(found.samples.sum()) == SAMPLES - 3
    assert not {0, 1, 2} & {each.number for each in (*found.worst, *found.confident)}


def test_samples_without_a_token_set_say_nothing_of_it(tmp_path: Path) -> None:
    _, columns = planted_data()
    hard = columns["hard"]
    away = hard.nonzero()[::2, 0].tolist()
    found = changed(tmp_path, "first", False, away)
    kept = hard.clone()
    kept[away] = False
    bent = columns["noise"][:, 1, 2] + 3.0 * hard[:, None, None] * columns["first"][0]
    mass = bent.softmax(dim=-1)[..., 0].mean(dim=-1)[kept].mean()
    place = (found.layer_names.index(LAYER), 2, found.statistics.index("mass/first"), 0)
    assert float(found.mean[place]) == pytest.approx(float(mass), rel=1e-5)


def test_many_classes_are_not_told_apart(tmp_path: Path) -> None:
    data, columns = planted_data()
    for row in data.dataset:
        row["scores"] = torch.nn.functional.pad(row["scores"], (0, 63), value=-9.0)
    analysis = ErrorAnalysis(samples=0)
    quiet_trainer(tmp_path, [analysis]).validate(Fixed(Planted(True)), data, verbose=False)
    assert analysis.result is not None
    assert analysis.result.class_names == ("all",)
    assert analysis.result.samples.tolist() == [[int(columns["hard"].sum()), int((~columns["hard"]).sum())]]


def test_classes_are_averaged_by_precision(tmp_path: Path) -> None:
    data, _ = planted_data()
    for place, row in enumerate(data.dataset):  # class 1 is rare
        row["labels"] = row["labels"] * (0 if place % 4 else 1)
    analysis = ErrorAnalysis(samples=0)
    quiet_trainer(tmp_path, [analysis]).validate(Fixed(Planted(True)), data, verbose=False)
    assert analysis.result is not None
    g, errors, adjusted = (
        field.double().numpy()
        for field in (analysis.result.within.g, analysis.result.within.standard_error, analysis.result.adjusted)
    )
    cell = (1, 2, analysis.result.statistics.index("entropy"))
    weights = [1 / error**2 for error in errors[cell]]
    expected = sum(weight * effect for weight, effect in zip(weights, g[cell], strict=True)) / sum(weights)
    assert adjusted[cell] == pytest.approx(expected, rel=1e-9)
    assert abs(expected - g[cell].mean()) > 1e-3  # else it would not matter


def test_all_is_exchanged_before_the_code_of_others_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def exchange(share: Any, **_: Any) -> list[Any]:
        order.append("exchange")
        return [share]

    class Tokenizer:
        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            order.append("tokenizer")
            raise KeyError("unknown id")

    for module in (_error_exchange, _error_gallery, _error_sums):
        monkeypatch.setattr(module, "from_all_processes", exchange)
    monkeypatch.setattr("attn_callbacks.callbacks.error_analysis.are_connected", lambda _: True)
    for name, value in (("get_rank", 0), ("get_world_size", 1), ("all_reduce", None)):
        monkeypatch.setattr(torch.distributed, name, lambda *_, value=value: value)
    module = Fixed(Planted(True))
    module.tokenizer = Tokenizer()
    analysis = ErrorAnalysis(samples=2)
    trainer = quiet_trainer(tmp_path, [analysis])
    with pytest.warns(UserWarning, match="unknown id"):
        trainer.validate(module, planted_data()[0], verbose=False)
    assert order == [*["exchange"] * 6, "tokenizer"]


def test_why_a_process_failed_is_told_to_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[Any] = []
    monkeypatch.setattr(_error_sums, "from_all_processes", lambda share, **_: shares.append(share) or [share])

    def late(*_: Any) -> None:
        raise MemoryError("full")

    monkeypatch.setattr("attn_callbacks.callbacks._error_step.sampled_head_statistics", late)
    with pytest.warns(UserWarning, match="MemoryError: full"):
        analysed(tmp_path, bends=True)
    monkeypatch.undo()
    monkeypatch.setattr(_error_sums, "from_all_processes", lambda share, **_: shares.append(share) or [share])
    monkeypatch.setattr(_error_gallery.WorstSamples, "entries", late)
    with pytest.warns(UserWarning, match="could not measure all of its data. MemoryError: full"):
        analysed(tmp_path, bends=True)
    assert [failure for failure, _ in shares] == ["MemoryError: full"] * 2


def test_layers_of_other_sizes_on_other_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def exchange(share: Any, **_: Any) -> list[Any]:
        failure, sizes = share
        return [share, (failure, {name: size._replace(heads=7) for name, size in sizes.items()})]

    monkeypatch.setattr(_error_sums, "from_all_processes", exchange)
    sums = _error_sums.ErrorSums(is_distributed=True)
    sums.add("layer", torch.rand(4, 2, 3), torch.zeros(4, dtype=torch.long), torch.ones(4, dtype=torch.bool), 2)
    with pytest.raises(RuntimeError, match="other numbers of heads or classes"):
        sums.conclude(torch.device("cpu"), failure=None)
    assert worst_of_all([], 2, is_distributed=False) == []


def test_nothing_is_drawn_where_nobody_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(BackgroundWriter, "submit", lambda self, job, size=0: drawn.append(job))
    analysis = ErrorAnalysis(samples=1)
    quiet_trainer(tmp_path, [analysis]).validate(Classifier(), loader(16), verbose=False)
    assert analysis.result is not None
    assert drawn == []
