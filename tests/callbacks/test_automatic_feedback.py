"""Automatic feedback in whole runs: what it takes up, what it leaves alone, and what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import losses
from attn_callbacks import BatchSchema, BiasMonitor, DynamicDistributedSampler, MaskRandomization, Resampling
from attn_callbacks._lightning import MisconfigurationException
from tests.callbacks.feeding import CASES, Data, Marked
from tests.callbacks.models import Classifier, Texts, quiet_trainer


def test_automatic_feedback_is_silent_about_data_without_marks(tmp_path: Path, recwarn: Any) -> None:
    monitor = BiasMonitor(feedback="automatic", schema=BatchSchema(spurious=lambda batch: None), min_support=2)
    module = Classifier()
    quiet_trainer(tmp_path, [monitor], max_epochs=2).fit(module, datamodule=Data(CASES["MaskRandomization"]))
    assert not [w for w in recwarn if "spurious" in str(w.message)]
    (said,) = [d for entry in monitor.ledger for d in entry["decisions"] if d["feedback"] == "MaskRandomization"]
    assert said["action"].startswith("withdrawn: `MaskRandomization` saw no `spurious` in 6 training steps")


@pytest.mark.parametrize("reader", ["spurious", lambda batch: batch.get("spurious")])
def test_marks_that_training_lacks_are_told(reader: Any, tmp_path: Path) -> None:
    data, plain = Data(CASES["MaskRandomization"]), Texts(40)
    data.train_dataloader = lambda: DataLoader(plain, 8)
    schema = BatchSchema(spurious=reader)
    monitor = BiasMonitor(feedback="automatic", schema=schema, min_support=2)
    with pytest.warns(UserWarning, match="`MaskRandomization` (saw no|cannot take part)"):
        quiet_trainer(tmp_path, [monitor], max_epochs=2).fit(Classifier(), datamodule=data)
    asked = BiasMonitor(feedback=[MaskRandomization(when="always")], schema=schema, min_support=2)
    with pytest.raises(MisconfigurationException, match="spurious"):
        quiet_trainer(tmp_path, [asked], max_epochs=2).fit(Classifier(), datamodule=data)


def test_what_a_loss_corrects_is_not_sampled_as_well(tmp_path: Path) -> None:
    class Margins(Classifier):
        def __init__(self, counts: list[int]) -> None:
            super().__init__()
            self.criterion = losses.LogitAdjustedLoss(counts)

    def deciding(counts: list[int], folder: str) -> set[str]:
        monitor = BiasMonitor(feedback="automatic", min_support=4, patience=None)
        data = Data(CASES["Resampling"])
        data.validation = Marked(200, seed=1, agreement=0.5)
        quiet_trainer(tmp_path / folder, [monitor], max_epochs=2).fit(Margins(counts), datamodule=data)
        return {d["feedback"] for entry in monitor.ledger for d in entry["decisions"]} & {
            "Resampling",
            "ClassReweighting",
        }

    assert deciding([1, 1], "even") == {"Resampling"}
    assert "Resampling" not in deciding([3, 1], "uneven")


def test_a_sampler_of_other_data_is_refused(tmp_path: Path) -> None:
    data = Data(CASES["Resampling"])
    data.train_dataloader = lambda: DataLoader(Texts(40), 8, sampler=DynamicDistributedSampler([0, 1] * 10))
    monitor = BiasMonitor(feedback=[Resampling()])
    with pytest.raises(MisconfigurationException, match="built from 20 labels, and the data set has 40 samples"):
        quiet_trainer(tmp_path, [monitor], max_epochs=1).fit(Classifier(), datamodule=data)


def test_automatic_feedback_corrects_groups_once_for_each_kind_of_data(tmp_path: Path) -> None:
    monitor, module = BiasMonitor(feedback="automatic", min_support=4, patience=None), Classifier()
    for folder, case in (("plain", "AttentionGuidance"), ("sampled", "Resampling")):
        data = Data(CASES[case])
        data.validation = Marked(200, seed=1, agreement=0.5)
        quiet_trainer(tmp_path / folder, [monitor], max_epochs=2).fit(module, datamodule=data)
        names = {decision["feedback"] for entry in monitor.ledger[-2:] for decision in entry["decisions"]}
        assert ("Resampling" in names) == (folder == "sampled")
        assert ("ClassReweighting" in names) == (folder == "plain")
    assert torch.equal(module.criterion.class_weight, torch.ones(4, 2))  # given back to the sampler's care
