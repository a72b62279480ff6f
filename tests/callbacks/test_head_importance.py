"""HeadStatistics with importance: what it logs, and that it leaves training as it is."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attn_callbacks import HeadStatistics
from attn_callbacks.callbacks import _gate_sums
from attn_callbacks.callbacks._gate_sums import GateSums
from tests.callbacks.board import events, raw_events
from tests.callbacks.gating import Importance, Still, data, explicit, train
from tests.callbacks.models import HEADS, LAYERS, Classifier, board_logger, csv_logger, fit, quiet_trainer

NAMES = tuple(f"net.layers.{layer}" for layer in range(LAYERS))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[HeadStatistics, Path, Still]:
    folder, module = tmp_path_factory.mktemp("run"), Still()
    statistics = HeadStatistics(importance_every_n_steps=1, per_head=True)
    loggers = [csv_logger(folder), board_logger(folder)]
    fit(module, quiet_trainer(folder, [statistics], logger=loggers), data(), data())
    return statistics, folder, module


def test_it_is_the_size_of_explicit_gates(run: tuple[HeadStatistics, Path, Still]) -> None:
    statistics, _, module = run
    expected = np.abs(explicit(module.net))
    assert statistics.importance is not None
    assert statistics.importance_layer_names == NAMES
    np.testing.assert_allclose(statistics.importance.mean.numpy(), expected.mean(axis=0), rtol=1e-5, atol=1e-7)
    errors = expected.std(axis=0, ddof=1) / np.sqrt(len(expected))
    np.testing.assert_allclose(statistics.importance.standard_error.numpy(), errors, rtol=1e-4, atol=1e-7)


def test_the_table_has_a_row_a_head(run: tuple[HeadStatistics, Path, Still]) -> None:
    statistics, folder, _ = run
    (table,) = folder.glob("**/head_statistics.csv")
    rows = [row for row in csv.DictReader(table.open()) if row["statistic"] == "importance"]
    assert [(row["layer"], int(row["head"])) for row in rows] == [(name, h) for name in NAMES for h in range(HEADS)]
    np.testing.assert_allclose([float(row["value"]) for row in rows], statistics.importance.mean.flatten())
    np.testing.assert_allclose([float(row["standard_error"]) for row in rows], statistics.importance[1].flatten())


def test_it_is_in_the_same_event(run: tuple[HeadStatistics, Path, Still]) -> None:
    statistics, folder, _ = run
    (tags,) = [tags for tags in raw_events(folder / "board") if "heads/importance" in tags]
    assert {"heads/entropy", *(f"heads/importance/{name}/head_{h}" for name in NAMES for h in range(HEADS))} <= set(
        tags
    )
    board = events(folder / "board")
    for row, name in zip(statistics.importance.mean, NAMES, strict=True):
        assert board.Scalars(f"heads/importance/{name}")[0].value == pytest.approx(float(row.mean()), rel=1e-5)
    mean = float(statistics.importance.mean.mean())
    assert board.Scalars("heads/importance_mean")[0].value == pytest.approx(mean, rel=1e-5)


def test_every_nth_step_is_that_of_the_meter(tmp_path: Path) -> None:
    meter = train(tmp_path / "meter", Still(), Importance(every_n_steps=2))
    statistics = HeadStatistics(importance_every_n_steps=2)
    fit(Still(), quiet_trainer(tmp_path, [statistics], logger=csv_logger(tmp_path)), data(), data())
    np.testing.assert_array_equal(statistics.importance.mean.numpy(), meter.means)


def weights_after(callbacks: list[Any], folder: Path) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    module = Classifier()
    fit(module, quiet_trainer(folder, callbacks, logger=csv_logger(folder), max_epochs=2))
    return module.state_dict()


def test_training_is_bit_identical(tmp_path: Path) -> None:
    plain = weights_after([], tmp_path / "plain")
    watched = weights_after([HeadStatistics(importance_every_n_steps=1)], tmp_path / "watched")
    assert {key for key, value in plain.items() if not torch.equal(value, watched[key])} == set()


def test_without_the_option_training_steps_are_left_alone(tmp_path: Path) -> None:
    seen = []

    class Watched(Still):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            seen.append("training_step" in vars(self))
            return super().training_step(batch, batch_idx)

    for every in (None, 1):
        statistics = HeadStatistics(importance_every_n_steps=every)
        module = Watched()
        fit(module, quiet_trainer(tmp_path, [statistics], logger=csv_logger(tmp_path)), data(), data())
        assert (statistics.importance is None) == (every is None)
        assert "training_step" not in vars(module)
    assert seen == [False] * 3 + [True] * 3


@pytest.mark.parametrize("every", [0, -1])
def test_no_step_is_no_choice(every: int) -> None:
    with pytest.raises(ValueError, match="`importance_every_n_steps` must be at least 1"):
        HeadStatistics(importance_every_n_steps=every)


def test_importance_outlives_statistics_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise MemoryError("full")

    monkeypatch.setattr(HeadStatistics, "_measure", broken)
    statistics = HeadStatistics(importance_every_n_steps=1)
    trainer = quiet_trainer(tmp_path, [statistics], logger=board_logger(tmp_path))
    with pytest.warns(UserWarning, match="`HeadStatistics` is switched off.*MemoryError: full"):
        fit(Still(), trainer, data(), data())
    assert statistics.result is None
    assert statistics.importance is not None
    tags = events(tmp_path / "board").Tags()
    assert tags["images"] == ["heads/importance"]
    assert {"heads/importance_mean", f"heads/importance/{NAMES[0]}"} <= set(tags["scalars"])
    assert trainer.callback_metrics["heads/importance_mean"] == pytest.approx(float(statistics.importance.mean.mean()))


def test_statistics_outlive_an_exchange_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("connection lost")

    monkeypatch.setattr(GateSums, "conclude", broken)
    statistics = HeadStatistics(importance_every_n_steps=1)
    with pytest.warns(UserWarning, match="The importance of `HeadStatistics` is switched off.*connection lost"):
        fit(Still(), quiet_trainer(tmp_path, [statistics], logger=csv_logger(tmp_path)), data(), data())
    assert statistics.importance is None
    assert statistics.result is not None


def test_a_process_that_failed_switches_all_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank zero is sound; the other process says that it failed."""
    monkeypatch.setattr(_gate_sums, "from_all_processes", lambda share, **_: [share, (True, True, {})])
    callback = Importance()
    with pytest.warns(UserWarning, match="Importance is switched off .* A process could not take in all"):
        train(tmp_path, Still(), callback)
    assert callback.found == [None]
    assert callback.guard.off


def test_gradients_that_are_not_finite_are_told_apart_from_none(tmp_path: Path) -> None:
    class Overflowing(Still):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) * torch.inf

    callback = Importance()
    with pytest.warns(UserWarning, match=r"'net.layers.0', 'net.layers.1' were not finite") as told:
        train(tmp_path, Overflowing(), callback)
    assert not any("No gradient" in str(warning.message) for warning in told)
    assert callback.found[0].left_out.min() == 12
