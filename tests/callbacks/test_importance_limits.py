"""HeadImportance: the precision and the time of the Trainer's user, labels that are no class, what is told."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attn_callbacks.analysis.interaction import HeadPair
from attn_callbacks.batch import BatchSchema
from attn_callbacks.callbacks import _importance_study
from attn_callbacks.callbacks._importance_log import study_text
from attn_callbacks.callbacks._importance_study import HeadStudy, study
from attn_callbacks.callbacks._writer import BackgroundWriter
from attn_callbacks.callbacks.head_importance import HeadImportance
from tests.callbacks.models import Bert, Classifier, loader, quiet_trainer


def validated(folder: Path, **options: Any) -> HeadImportance:
    callback = HeadImportance(batches=1, **options)
    quiet_trainer(folder, [callback]).validate(Classifier(), loader(8, seed=1), verbose=False)
    return callback


def relabelled(label: float) -> BatchSchema:
    def target(batch: dict[str, Tensor]) -> Tensor:
        return batch["labels"].double().where(torch.arange(len(batch["labels"])) != 2, label)

    return BatchSchema(target=target)


@pytest.mark.parametrize("label", [2, 7, 0.5])
def test_labels_that_are_no_class_are_left_out_and_told_once(label: float, tmp_path: Path) -> None:
    said = rf"`HeadImportance` left out 1 samples whose labels are no class: got {label}\. .* from 0 to 1, one for each"
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=said):
        found = validated(tmp_path, schema=relabelled(label)).result
    torch.manual_seed(0)
    expected = validated(tmp_path, schema=relabelled(-100)).result
    assert found is not None
    assert expected is not None
    assert found.importance.samples == expected.importance.samples == 7
    assert torch.equal(found.importance.importance, expected.importance.importance)


def test_runs_are_made_in_the_precision_of_the_trainer(tmp_path: Path) -> None:
    seen: list[bool] = []

    def loss(module: Any, batch: dict[str, Tensor]) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return F.cross_entropy(module(batch).float(), batch["labels"], reduction="none")

    callback = HeadImportance(batches=1, loss=loss)
    trainer = quiet_trainer(tmp_path, [callback], precision="bf16-mixed")
    trainer.validate(Classifier(Bert()), loader(8, seed=1), verbose=False)
    assert callback.result is not None
    assert set(seen) == {True}


def test_parts_share_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, given = [100.0], {}

    def part(name: str, takes: float) -> Any:
        def run(*_: Any, seconds: float, **__: Any) -> Any:
            given[name] = seconds
            clock[0] += takes
            return SimpleNamespace(importance=torch.ones(2, 2), change=torch.ones(2, 2), is_complete=True)

        return run

    monkeypatch.setattr(_importance_study, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    for name, takes in (("head_importance", 6.0), ("pruning_curve", 3.0), ("head_interactions", 0.5)):
        monkeypatch.setattr(_importance_study, name, part(name, takes))
    arguments: Any = (torch.nn.Identity(), [], lambda *_: None, None)
    found = study(*arguments, method="gate", interactions=True, seconds=10.0, epoch=0)
    assert given == {"head_importance": 10.0, "pruning_curve": 4.0, "head_interactions": 1.0}
    assert (found.seconds, found.unfinished) == (9.5, ())
    found = study(*arguments, method="gate", interactions=True, seconds=8.0, epoch=0)
    assert found.unfinished == ("pairs",)
    assert "The time was up before all was measured: pairs." in study_text(found_text(found), 0.01)
    assert study(*arguments, method="gate", interactions=False, seconds=8.0, epoch=0).unfinished == ()
    assert study(*arguments, method="gate", interactions=False, seconds=5.0, epoch=0).unfinished == ("pruning",)


def found_text(found: HeadStudy) -> HeadStudy:
    """The study without its stand-ins."""
    return HeadStudy(0, None, None, None, None, found.seconds, found.unfinished)


def test_pairs_within_two_standard_errors_are_not_listed() -> None:
    def pairs(sign: float) -> Any:
        sizes = (2.1, 1.9)
        return lambda most: [HeadPair(("a", n), ("b", n), sign * size, 1.0) for n, size in enumerate(sizes)][:most]

    found: Any = SimpleNamespace(redundant=pairs(1.0), synergetic=pairs(-1.0), layer_names=("a", "b"))
    text = study_text(HeadStudy(0, None, None, None, found, 1.0), 0.01)
    assert [line.split("|")[1].strip() for line in text.splitlines()[2:]] == ["redundant", "synergetic"]
    assert "head 1" not in text


@pytest.mark.parametrize("method", ["gate", "ablation"])
def test_nothing_is_drawn_where_nobody_keeps_it(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(BackgroundWriter, "submit", lambda self, job, size=0: drawn.append(job))
    assert validated(tmp_path, method=method).result is not None
    assert drawn == []
