"""What arrives at TensorBoard: tags, one event a log point, pictures and numbers."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from attn_callbacks import BiasMonitor, HeadStatistics
from attn_callbacks.functional import STATISTICS
from tests.callbacks.board import events, raw_events, watchers
from tests.callbacks.models import LAYERS, Classifier, board_logger, fit, loader, pl, quiet_trainer

NAMES = [f"net.encoder.layers.{layer}.self_attn" for layer in range(LAYERS)]
EPOCHS, STEPS = 2, 4  # optimiser steps an epoch


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("board")
    fit(Classifier(), quiet_trainer(folder, watchers(), logger=board_logger(folder), max_epochs=EPOCHS))
    return events(folder / "board")


def test_tensorboard_tags(board: Any) -> None:
    tags = board.Tags()
    drawn = {f"attention/sample_{sample}/{name}" for sample in range(2) for name in NAMES}
    assert set(tags["images"]) == drawn | {f"heads/{name}" for name in STATISTICS} | {"bias/confusion"}
    scalars = set(tags["scalars"])
    assert {f"heads/{name}_mean" for name in STATISTICS} <= scalars
    assert {f"heads/entropy/{name}" for name in NAMES} <= scalars
    assert f"heads/entropy/{NAMES[0]}/head_1" in scalars
    monitored = {
        "bias/accuracy",
        "bias/gap",
        "bias/worst_class_recall",
        "bias/worst_group_accuracy",
        "bias/term/AttentionGuidance",
    }
    assert monitored | {"bias/recall/bad", "bias/relevance_mass/good"} <= scalars
    assert tags["tensors"] == ["bias/summary/text_summary"]


def test_tensorboard_has_one_event_a_validation_at_the_optimiser_steps(board: Any) -> None:
    tags = board.Tags()
    for tag in tags["images"]:
        assert [event.step for event in board.Images(tag)] == [STEPS, 2 * STEPS], tag
    for tag in (f"heads/entropy/{NAMES[0]}", "heads/entropy_mean", "bias/recall/bad", "bias/accuracy", "bias/gap"):
        assert [event.step for event in board.Scalars(tag)] == [STEPS, 2 * STEPS]
    texts = [event.tensor_proto.string_val[0].decode() for event in board.Tensors("bias/summary/text_summary")]
    assert [f"epoch {epoch}" in text for epoch, text in enumerate(texts)] == [True, True]


def test_a_validation_is_one_event_of_tensorboard(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, [HeadStatistics(per_head=True)], logger=board_logger(tmp_path), max_epochs=EPOCHS)
    fit(Classifier(), trainer)
    ours = [tags for tags in raw_events(tmp_path / "board") if any(tag.startswith("heads/") for tag in tags)]
    assert len(ours) == EPOCHS
    means = {f"heads/{name}_mean" for name in STATISTICS}
    layers = {f"heads/{name}/{layer}" for name in STATISTICS for layer in NAMES}
    heads = {f"{tag}/head_{head}" for tag in layers for head in range(2)}
    assert set(ours[0]) == means | layers | heads | {f"heads/{name}" for name in STATISTICS} | {"epoch"}
    assert ours[0] == ours[1]
    assert len(ours[0]) == len(set(ours[0]))


def test_a_report_on_bias_is_one_event_beside_its_text(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, [BiasMonitor()], logger=board_logger(tmp_path), max_epochs=EPOCHS)
    fit(Classifier(), trainer)
    found = [tags for tags in raw_events(tmp_path / "board") if any(tag.startswith("bias/") for tag in tags)]
    assert len(found) == 2 * EPOCHS
    assert {"bias/confusion", "bias/accuracy", "bias/gap", "bias/worst_class_recall", "bias/recall/0"} <= set(
        max(found, key=len)
    )
    assert sorted({tag for tags in found if len(tags) == 1 for tag in tags}) == ["bias/summary/text_summary"]


def test_what_trainer_validate_returns_has_what_is_monitored(tmp_path: Path) -> None:
    callbacks = [HeadStatistics(), BiasMonitor()]
    trainer = quiet_trainer(tmp_path, callbacks, logger=board_logger(tmp_path))
    (returned,) = trainer.validate(Classifier(), loader(16), verbose=False)
    assert {*(f"heads/{name}_mean" for name in STATISTICS), "bias/accuracy", "bias/gap"} <= set(returned)


def test_events_say_what_the_table_says(tmp_path: Path) -> None:
    statistics = HeadStatistics(per_head=True)
    fit(Classifier(), quiet_trainer(tmp_path, [statistics], logger=board_logger(tmp_path)))
    board = events(tmp_path / "board")
    for layer, name in enumerate(NAMES):
        for index, statistic in enumerate(STATISTICS):
            values = statistics.result.mean[layer, :, index]
            for head, value in enumerate(values):
                (event,) = board.Scalars(f"heads/{statistic}/{name}/head_{head}")
                assert event.value == pytest.approx(value.item(), rel=1e-6)
            (event,) = board.Scalars(f"heads/{statistic}/{name}")
            assert event.value == pytest.approx(values.mean().item(), rel=1e-6)
    for index, statistic in enumerate(STATISTICS):
        (event,) = board.Scalars(f"heads/{statistic}_mean")
        assert event.value == pytest.approx(statistics.result.mean[..., index].nanmean().item(), rel=1e-6)


def test_a_logger_with_a_way_of_its_own_is_asked_to_log(tmp_path: Path) -> None:
    seen: list[tuple[set[str], int]] = []

    class Filtering(pl.loggers.TensorBoardLogger):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            seen.append((set(metrics), step))
            super().log_metrics(metrics, step)

    loggers = [
        Filtering(str(tmp_path), name="", version="own"),
        pl.loggers.TensorBoardLogger(str(tmp_path), name="", version="prefixed", prefix="ours"),
    ]
    fit(Classifier(), quiet_trainer(tmp_path, [HeadStatistics()], logger=loggers))
    layers = {f"heads/{name}/{layer}" for name in STATISTICS for layer in NAMES}
    means = {f"heads/{name}_mean" for name in STATISTICS}
    assert [(names, step) for names, step in seen if layers & names] == [(layers | means | {"epoch"}, STEPS)]
    own, prefixed = (events(tmp_path / version).Tags() for version in ("own", "prefixed"))
    assert layers <= set(own["scalars"])
    assert {f"ours-{tag}" for tag in layers} <= set(prefixed["scalars"])
    for tags in (own, prefixed):
        assert set(tags["images"]) == {f"heads/{name}" for name in STATISTICS}


def test_tensorboard_pictures_decode(board: Any) -> None:
    for tag in board.Tags()["images"]:
        event = board.Images(tag)[-1]
        picture = Image.open(io.BytesIO(event.encoded_image_string))
        assert picture.size == (event.width, event.height)
        assert len(np.unique(np.asarray(picture.convert("RGB")))) > 8


def test_validation_alone_writes_each_value_once(tmp_path: Path) -> None:
    module, trainer = Classifier(), quiet_trainer(tmp_path, watchers(), logger=board_logger(tmp_path))
    (returned,) = trainer.validate(module, loader(), verbose=False)
    board = events(tmp_path / "board")
    for tag in ("heads/entropy_mean", "bias/accuracy"):
        assert [event.value for event in board.Scalars(tag)] == [pytest.approx(returned[tag])]
