"""What arrives at the loggers: tags, pictures, numbers and files."""

from __future__ import annotations

import csv
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from attn_callbacks import (
    AttentionHeatmaps,
    BiasMonitor,
    ErrorAnalysis,
    HeadImportance,
    HeadRoles,
    HeadStatistics,
    TrainingHealth,
)
from attn_callbacks.callbacks._loggers import run_folder
from attn_callbacks.functional import STATISTICS, HealthThresholds
from tests.callbacks.board import events, watchers
from tests.callbacks.models import (
    LAYERS,
    Classifier,
    Vit,
    board_logger,
    csv_logger,
    fit,
    pair_loader,
    pl,
    quiet_trainer,
)

NAMES = [f"net.encoder.layers.{layer}.self_attn" for layer in range(LAYERS)]
EPOCHS, STEPS = 2, 4  # optimiser steps an epoch


def test_csv_logger_gets_pictures_as_files_and_the_table(tmp_path: Path) -> None:
    statistics = HeadStatistics()
    trainer = quiet_trainer(
        tmp_path, [AttentionHeatmaps(samples=1), statistics, BiasMonitor()], logger=csv_logger(tmp_path), max_epochs=2
    )
    fit(Classifier(), trainer)
    folder = tmp_path / "run"
    drawn = {f"attention/sample_0/{name}_step{step}.png" for name in NAMES for step in (4, 8)}
    grids = {f"heads/{name}_step{step}.png" for name in STATISTICS for step in (4, 8)}
    found = {path.relative_to(folder).as_posix() for path in folder.glob("**/*.png")}
    assert found == drawn | grids | {"bias/confusion_step4.png", "bias/confusion_step8.png"}
    for path in folder.glob("**/*.png"):
        Image.open(path).load()

    with (folder / "attention" / "head_statistics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["epoch", "step", "layer", "head", "statistic", "value", "standard_error"]
    assert {(row["epoch"], row["step"]) for row in rows} == {("0", "4"), ("1", "8")}
    last = {(r["layer"], int(r["head"]), r["statistic"]): r for r in rows if r["epoch"] == "1"}
    for layer, name in enumerate(NAMES):
        for head in range(2):
            for index, statistic in enumerate(STATISTICS):
                row = last[name, head, statistic]
                assert float(row["value"]) == statistics.result.mean[layer, head, index]
                error = float(statistics.result.standard_error[layer, head, index])
                assert row["standard_error"] == ("" if np.isnan(error) else str(error))
            assert float(last[name, head, "entropy_median"]["value"]) == statistics.result.median[layer, head, 0]

    means = {
        statistic: np.mean([float(r["value"]) for k, r in last.items() if k[2] == statistic])
        for statistic in STATISTICS
    }
    logged = {name: trainer.callback_metrics[f"heads/{name}_mean"].item() for name in STATISTICS}
    assert logged == pytest.approx(means, rel=1e-6)

    with (folder / "metrics.csv").open(newline="") as file:
        written = [row for row in csv.DictReader(file) if row[f"heads/entropy/{NAMES[1]}"]]
    expected = np.mean([float(last[NAMES[1], head, "entropy"]["value"]) for head in range(2)])
    assert float(written[-1][f"heads/entropy/{NAMES[1]}"]) == pytest.approx(expected)
    assert [(row["step"], row["epoch"]) for row in written] == [("4", "0.0"), ("8", "1.0")]
    assert float(written[-1]["heads/entropy_mean"]) == pytest.approx(means["entropy"], rel=1e-6)
    with (folder / "metrics.csv").open(newline="") as file:
        accuracies = [float(row["bias/accuracy"]) for row in csv.DictReader(file) if row["bias/accuracy"]]
    assert len(accuracies) == 2
    assert accuracies[1] == pytest.approx(trainer.callback_metrics["bias/accuracy"].item())
    lines = [json.loads(line) for line in (folder / "attention" / "bias.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]


def make_image_logger(folder: Path) -> Any:
    """A logger as W&B's is: takes pictures, text and numbers, and only says where it saves."""

    class ImageLogger(pl.loggers.logger.Logger):
        def __init__(self) -> None:
            self.images: list[tuple[str, Any, int]] = []
            self.texts: list[tuple[str, str]] = []
            self.numbers: list[tuple[dict[str, float], int]] = []
            self.experiment = object()

        name, version, save_dir = "project", "abc", str(folder)

        def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
            assert threading.current_thread() is threading.main_thread()
            self.images.append((key, images[0], step))

        def log_text(self, key: str, columns: list[str], data: list[list[str]], step: int | None = None) -> None:
            self.texts.append((key, data[0][0]))

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            self.numbers.append((metrics, step))

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    return ImageLogger()


def test_logger_that_takes_pictures(tmp_path: Path) -> None:
    logger = make_image_logger(tmp_path)
    fit(Classifier(), quiet_trainer(tmp_path, watchers(), logger=logger))
    keys = [key for key, _, _ in logger.images]
    assert len(keys) == len(set(keys)) == 2 * LAYERS + len(STATISTICS) + 1
    assert all(image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8 for _, image, _ in logger.images)
    assert {step for _, _, step in logger.images} == {STEPS}
    assert [key for key, _ in logger.texts] == ["bias/summary"]
    assert any("bias/recall/good" in metrics for metrics, _ in logger.numbers)
    assert not list(tmp_path.glob("**/*.png"))
    assert (tmp_path / "project" / "abc" / "attention" / "head_statistics.csv").exists()  # runs do not share a folder


def test_two_loggers_get_the_same(tmp_path: Path) -> None:
    loggers = [board_logger(tmp_path), csv_logger(tmp_path)]
    trainer = quiet_trainer(tmp_path, [AttentionHeatmaps(samples=1), HeadStatistics()], logger=loggers)
    fit(Classifier(), trainer)
    assert run_folder(trainer) == tmp_path / "board"
    tags = events(tmp_path / "board").Tags()["images"]
    files = {path.relative_to(tmp_path / "board").as_posix() for path in tmp_path.glob("board/**/*.png")}
    assert files == {f"{tag}_step{STEPS}.png" for tag in tags}


def test_image_model_gets_overlays(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, [AttentionHeatmaps(samples=1)], logger=board_logger(tmp_path))
    fit(Classifier(Vit()), trainer, pair_loader(16, images=True), pair_loader(8, images=True))
    tags = events(tmp_path / "board").Tags()["images"]
    assert {tag for tag in tags if tag.endswith("/image")} == {f"attention/sample_0/{name}/image" for name in NAMES}


def test_a_full_disk_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("attn_callbacks.callbacks.head_statistics.append_table", full)
    trainer = quiet_trainer(tmp_path, [HeadStatistics()], logger=csv_logger(tmp_path))
    with pytest.warns(UserWarning, match="`HeadStatistics` is switched off.*OSError: No space left"):
        fit(Classifier(), trainer)
    assert trainer.current_epoch == 1


def test_texts_are_kept_by_loggers_that_take_none(tmp_path: Path) -> None:
    roles = HeadRoles(clusters=False, margin=0.0)
    health = TrainingHealth(every_n_steps=1, thresholds=HealthThresholds(max_logit=1e-6))
    trainer = quiet_trainer(tmp_path, [HeadImportance(batches=1), ErrorAnalysis(samples=1), roles, health],
                            logger=[csv_logger(tmp_path), board_logger(tmp_path)], max_epochs=2)  # fmt: skip
    with pytest.warns(UserWarning, match="max logit"):
        fit(Classifier(), trainer)
    kept = {path.relative_to(tmp_path / "run").as_posix() for path in tmp_path.glob("run/**/*.md")}
    assert kept >= {"errors/differences.md", "health/alert.md", "importance/summary.md"}
    text = (tmp_path / "run" / "errors" / "differences.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("# Step")] == ["# Step 4", "# Step 8"]
    assert not list(tmp_path.glob("board/**/*.md"))
