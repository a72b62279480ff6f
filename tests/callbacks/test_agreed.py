"""Values that callbacks choose models by, in a run and in one that was resumed."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from attn_callbacks import BiasMonitor, HeadStatistics
from attn_callbacks.callbacks._bias_sensor import BiasSensor
from tests.callbacks.models import Classifier, csv_logger, feeding_monitor, fit, loader, pl, quiet_trainer


def test_model_checkpoint_can_monitor(tmp_path: Path) -> None:
    best = pl.callbacks.ModelCheckpoint(str(tmp_path), monitor="bias/worst_group_accuracy", mode="max", filename="best")
    stop = pl.callbacks.EarlyStopping(monitor="heads/entropy_mean", mode="min")
    trainer = quiet_trainer(
        tmp_path,
        [HeadStatistics(), feeding_monitor(), best, stop],
        logger=csv_logger(tmp_path),
        enable_checkpointing=True,
        max_epochs=2,
    )
    fit(Classifier(), trainer)
    assert best.best_model_score == pytest.approx(max(e["worst_group_accuracy"] for e in trainer.callbacks[1].ledger))
    assert stop.best_score == pytest.approx(trainer.callback_metrics["heads/entropy_mean"].item(), rel=0.2)


def test_a_resumed_run_goes_on_choosing(tmp_path: Path) -> None:
    def run(folder: Path, epochs: int, checkpoint: Path | None = None) -> tuple[Any, Any]:
        torch.manual_seed(0)
        best = pl.callbacks.ModelCheckpoint(
            str(folder), monitor="heads/entropy_mean", mode="max", save_last=True, save_top_k=2
        )
        stop = pl.callbacks.EarlyStopping("heads/entropy_mean", patience=9, mode="max")
        trainer = quiet_trainer(
            tmp_path, [HeadStatistics(), best, stop], logger=csv_logger(folder), enable_checkpointing=True,
            max_epochs=epochs,
        )  # fmt: skip
        fit(Classifier(), trainer, ckpt_path=checkpoint, weights_only=True)
        return best, stop

    whole, stop = run(tmp_path / "whole", 4)
    run(tmp_path / "half", 2)
    rest, stopped = run(tmp_path / "half", 4, tmp_path / "half" / "last.ckpt")
    scores = [sorted(float(score) for score in best.best_k_models.values()) for best in (whole, rest)]
    assert scores[0] == scores[1]
    assert whole.best_model_score == rest.best_model_score == stop.best_score == stopped.best_score
    assert len(scores[0]) == 2


def choosers(folder: Path, **options: Any) -> tuple[Any, Any]:
    best = pl.callbacks.ModelCheckpoint(str(folder / "best"), monitor="heads/entropy_mean", **options)
    return best, pl.callbacks.EarlyStopping("heads/entropy_mean", **options)


def fit_choosing(folder: Path, observer: Any, choosers: Any, epochs: int) -> Any:
    trainer = quiet_trainer(
        folder, [observer, *choosers], logger=csv_logger(folder), enable_checkpointing=True, max_epochs=epochs
    )
    fit(Classifier(), trainer, loader(8), loader(8))
    return trainer


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("limit", [None, 100.0])
def test_validations_that_are_not_looked_at_end_nothing(mode: str, limit: float | None, tmp_path: Path) -> None:
    best, stop = choosers(tmp_path, mode=mode)
    stop.patience, stop.divergence_threshold = 4, limit and (limit if mode == "min" else -limit)
    trainer = fit_choosing(tmp_path, HeadStatistics(every_n_epochs=3), (best, stop), 6)
    assert trainer.current_epoch == 6
    rows = csv.DictReader((tmp_path / "run" / "metrics.csv").open())
    written = [float(row["heads/entropy_mean"]) for row in rows if row["heads/entropy_mean"]]
    assert len(written) == 2  # nothing is written twice
    expected = (min if mode == "min" else max)(written)
    assert best.best_model_score.item() == pytest.approx(expected)
    assert stop.best_score.item() == pytest.approx(expected)
    assert "epoch=2" in best.best_model_path or "epoch=5" in best.best_model_path


def test_what_is_not_known_yet_is_the_last_choice(tmp_path: Path) -> None:
    best, _ = choosers(tmp_path)
    trainer = fit_choosing(tmp_path, HeadStatistics(every_n_epochs=2), [best], 1)
    assert trainer.callback_metrics["heads/entropy_mean"].isnan()
    assert best.best_model_score == torch.inf


@pytest.mark.parametrize("first", [0, 1])
def test_an_observer_that_is_switched_off_ends_nothing(
    first: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(callback: Any, call: Any) -> None:
        if broken.trainer.current_epoch >= first:
            raise MemoryError("full")
        measure(callback, call)

    measure = HeadStatistics._measure
    monkeypatch.setattr(HeadStatistics, "_measure", broken)
    statistics = HeadStatistics()
    setup = HeadStatistics.setup

    def noting(callback: Any, trainer: Any, *args: Any, **options: Any) -> None:
        broken.trainer = trainer
        setup(callback, trainer, *args, **options)

    monkeypatch.setattr(HeadStatistics, "setup", noting)
    with pytest.warns(UserWarning, match="`HeadStatistics` is switched off.*MemoryError"):
        trainer = fit_choosing(tmp_path, statistics, choosers(tmp_path), 3)
    assert trainer.current_epoch == 3


def test_a_monitor_of_bias_that_is_switched_off_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise MemoryError("full")

    monkeypatch.setattr(BiasSensor, "add", broken)
    best = pl.callbacks.ModelCheckpoint(str(tmp_path), monitor="bias/worst_class_recall", mode="max")
    stop = pl.callbacks.EarlyStopping("bias/accuracy", mode="max")
    with pytest.warns(UserWarning, match="`BiasMonitor` is switched off.*MemoryError"):
        trainer = fit_choosing(tmp_path, BiasMonitor(), (best, stop), 3)
    assert trainer.current_epoch == 3
