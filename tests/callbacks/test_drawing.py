"""Pictures are drawn while training goes on, and are there when it ends, however it ends."""

from __future__ import annotations

import importlib
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from attn_callbacks import BiasMonitor, HeadStatistics
from attn_callbacks.callbacks._writer import THREAD_NAME
from attn_callbacks.functional import STATISTICS
from tests.callbacks.board import events
from tests.callbacks.models import (
    DRAWING,
    REGISTRY,
    Classifier,
    board_logger,
    csv_logger,
    feeding_monitor,
    fit,
    pl,
    quiet_trainer,
    watchable,
)
from tests.callbacks.test_all import Failing
from tests.callbacks.test_writer import writer_threads

each = pytest.mark.parametrize("name", DRAWING)


DRAWS = {
    "AlignmentMonitor": "_alignment_log.layer_head_grid",
    "AttentionHeatmaps": "attention_heatmaps.attention_heads",
    "AttentionPaths": "attention_paths.token_strip",
    "BiasMonitor": "_bias_log.confusion_picture",
    "ErrorAnalysis": "_error_pictures.layer_head_grid",
    "HeadImportance": "_importance_log.layer_head_grid",
    "HeadRoles": "_roles_log.role_grid",
    "HeadStatistics": "head_statistics.layer_head_grid",
}
"""What each callback draws with, in the background."""


def test_everything_that_draws_is_listed() -> None:
    assert sorted(DRAWS) == DRAWING


def slowly(draw: Any, threads: set[str]) -> Any:
    def drawn(*args: Any, **options: Any) -> Any:
        threads.add(threading.current_thread().name)
        time.sleep(0.02)
        return draw(*args, **options)

    return drawn


def broken(*_: Any, **__: Any) -> None:
    raise MemoryError("no room for a picture")


def patched(monkeypatch: pytest.MonkeyPatch, name: str, change: Any) -> None:
    module, function = DRAWS[name].split(".")
    home = importlib.import_module(f"attn_callbacks.callbacks.{module}")
    monkeypatch.setattr(home, function, change(getattr(home, function)))


@each
@pytest.mark.parametrize("error", [None, RuntimeError("out of luck"), KeyboardInterrupt()], ids=repr)
def test_drawing_is_finished_before_the_loggers_close(
    name: str, error: BaseException | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    threads: set[str] = set()
    patched(monkeypatch, name, lambda draw: slowly(draw, threads))
    there: list[int] = []
    logger = csv_logger(tmp_path)
    monkeypatch.setattr(logger, "finalize", lambda status: there.append(len(list(tmp_path.glob("**/*.png")))))
    module = Failing("training_step", error or RuntimeError(), watchable(name).net)
    module.armed = error is not None
    module.fail_from = 1  # the first epoch is whole
    try:
        fit(module, quiet_trainer(tmp_path, [REGISTRY[name]()], logger=logger, max_epochs=2))
    except (RuntimeError, KeyboardInterrupt, SystemExit):
        assert error is not None
    pictures = list(tmp_path.glob("**/*.png"))
    assert there == [len(pictures)]
    assert {int(path.stem.split("_step")[1]) for path in pictures} == ({4} if error else {4, 8})
    assert all(thread.startswith(THREAD_NAME) for thread in threads)
    assert writer_threads() == []


@each
def test_a_picture_that_fails_warns_once_and_training_goes_on(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    patched(monkeypatch, name, lambda _: broken)
    trainer = quiet_trainer(tmp_path, [REGISTRY[name]()], logger=csv_logger(tmp_path), max_epochs=3)
    with pytest.warns(UserWarning, match=f"`{name}` is switched off.*MemoryError: no room") as caught:
        fit(watchable(name), trainer)
    assert len([warning for warning in caught if "switched off" in str(warning.message)]) == 1
    assert trainer.current_epoch == 3
    assert {path.stem.split("_step")[1] for path in tmp_path.glob("**/*.png")} <= {
        "4"
    }  # of another kind, queued before
    assert writer_threads() == []


def test_pictures_that_fail_in_the_middle_of_a_run_leave_the_numbers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    drawn: list[int] = []

    def at_first(draw: Any) -> Any:
        def drawing(*values: Any, **options: Any) -> Any:
            drawn.append(1)
            return (draw if len(drawn) == 1 else broken)(*values, **options)

        return drawing

    class Waiting(pl.Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            for future, _ in monitor._writer._waiting:
                future.exception()  # waits

    patched(monkeypatch, "BiasMonitor", at_first)
    monitor = BiasMonitor()
    logger = csv_logger(tmp_path)
    with pytest.warns(UserWarning, match="switched off.*no room"):
        fit(Classifier(), quiet_trainer(tmp_path, [monitor, Waiting()], logger=logger, max_epochs=4))
    logger.save()
    lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("bias/accuracy")
    assert len([line for line in lines[1:] if line.split(",")[column]]) == 4


def test_a_picture_that_fails_takes_nothing_else_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def picky(draw: Any) -> Any:
        return lambda values, **options: (broken if options["title"] == "distance" else draw)(values, **options)

    patched(monkeypatch, "HeadStatistics", picky)
    loggers = [board_logger(tmp_path), csv_logger(tmp_path)]
    with pytest.warns(UserWarning, match="`HeadStatistics` is switched off.*no room"):
        fit(Classifier(), quiet_trainer(tmp_path, [HeadStatistics()], logger=loggers))
    others = set(STATISTICS) - {"distance"}
    assert {path.name for path in tmp_path.glob("board/heads/*.png")} == {f"{name}_step4.png" for name in others}
    tags = events(tmp_path / "board").Tags()
    assert set(tags["images"]) == {f"heads/{name}" for name in others}
    assert "heads/distance/net.encoder.layers.0.self_attn" in tags["scalars"]
    assert (tmp_path / "board" / "attention" / "head_statistics.csv").exists()


def test_a_picture_that_fails_keeps_no_feedback_from_its_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    patched(monkeypatch, "BiasMonitor", lambda _: broken)
    monitor = feeding_monitor()
    trainer = quiet_trainer(tmp_path, [monitor], logger=csv_logger(tmp_path), max_epochs=3)
    with pytest.warns(UserWarning, match="The log of `BiasMonitor` is switched off.*no room"):
        fit(Classifier(), trainer)
    assert len(monitor.ledger) == 3
    assert monitor.ledger[0]["decisions"]
