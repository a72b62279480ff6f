"""A run that was interrupted and resumed is, to the last bit, the run that was not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from attn_callbacks import HeadStatistics
from tests.callbacks.feeding import EpochOrder
from tests.callbacks.models import Classifier, Texts, csv_logger, feeding_monitor, loader, pl, quiet_trainer


def run(folder: Path, epochs: int, checkpoint: Path | None = None, **options: Any) -> tuple[Any, Any, Path]:
    torch.manual_seed(0)
    module, monitor = Classifier(), feeding_monitor()
    saved = pl.callbacks.ModelCheckpoint(str(folder), save_last=True, every_n_epochs=1)
    trainer = quiet_trainer(
        folder, [HeadStatistics(), monitor, saved], logger=csv_logger(folder), max_epochs=epochs,
        enable_checkpointing=True, **options,
    )  # fmt: skip
    data = Texts(48, agreement=0.8)
    train = DataLoader(data, 8, sampler=EpochOrder(len(data)))
    trainer.fit(module, train, loader(40, seed=1), ckpt_path=checkpoint, weights_only=True)
    return module, monitor, folder / "last.ckpt"


def timeless(ledger: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in entry.items() if name != "time"} for entry in ledger]


def test_resumed_run_is_bitwise_the_unbroken_one(tmp_path: Path) -> None:
    whole, monitor, _ = run(tmp_path / "whole", 4)
    _, _, checkpoint = run(tmp_path / "half", 2)
    resumed, continued, _ = run(tmp_path / "rest", 4, checkpoint)
    assert {
        key for key, value in whole.state_dict().items() if not torch.equal(value, resumed.state_dict()[key])
    } == set()
    assert torch.equal(whole.criterion.class_weight, resumed.criterion.class_weight)
    assert not torch.equal(whole.criterion.class_weight, torch.ones(4, 2))
    assert timeless(continued.ledger) == timeless(monitor.ledger)
    assert torch.equal(continued.report.train_counts, monitor.report.train_counts)
    assert any(entry["decisions"] for entry in monitor.ledger)


def test_checkpoint_holds_nothing_that_safe_loading_refuses(tmp_path: Path) -> None:
    _, monitor, checkpoint = run(tmp_path, 1)
    content = torch.load(checkpoint, weights_only=True)
    assert list(content["callbacks"]).count(monitor.state_key) == 1
    assert "criterion.class_weight" not in content["state_dict"]


def test_checkpoint_moves_to_a_plain_criterion_and_back(tmp_path: Path) -> None:
    module, _, checkpoint = run(tmp_path, 1)
    plain = Classifier()
    plain.criterion = nn.CrossEntropyLoss()
    plain.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"], strict=True)
    module.load_state_dict(plain.state_dict(), strict=True)


def test_loading_twice_changes_nothing_more() -> None:
    monitor = feeding_monitor()
    state = {"feedback": [{"updates": 3}, {"active": True}], "fed": torch.tensor([[1, 2]]), "ledger": [{"epoch": 0}]}
    for _ in range(2):
        monitor.load_state_dict(state)
    assert monitor.state_dict()["feedback"][0]["updates"] == 3
    assert monitor.state_dict()["fed"].tolist() == [[1, 2]]
    assert monitor.ledger == [{"epoch": 0}]


def test_state_of_an_older_version_loads() -> None:
    monitor = feeding_monitor()
    fresh = repr(monitor.state_dict())
    with pytest.warns(UserWarning, match="the state of 0"):
        monitor.load_state_dict({})
    assert repr(monitor.state_dict()) == fresh
