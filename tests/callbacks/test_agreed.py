"""Values that callbacks choose models by, in a run and in one that was resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from attn_callbacks import HeadStatistics
from tests.callbacks.models import Classifier, csv_logger, feeding_monitor, fit, pl, quiet_trainer


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
