"""What a run leaves of its decisions: the ledger in the callback, in a file and as text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from attn_callbacks import AttentionGuidance, BiasMonitor, ClassReweighting, DynamicDistributedSampler
from attn_callbacks._lightning import MisconfigurationException
from attn_callbacks.bias import BiasReport
from attn_callbacks.feedback import Action, Feedback
from tests.callbacks.models import Classifier, Texts, csv_logger, fit, loader, quiet_trainer


class Noting(Feedback):
    """Answers every report, and changes nothing."""

    answers = frozenset({"class", "group"})

    def __init__(self) -> None:
        self.states: list[bool] = []

    def apply(self, report: BiasReport) -> Sequence[Action]:
        self.states.append(self.acting)
        found = self.answered(report)
        return [Action("noted", found[0].key, 0.0, 1.0)] if found else []


class Stubborn(Classifier):
    """Learns nothing, so that every finding stays."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.0)


def unfair(**options: Any) -> Stubborn:
    torch.manual_seed(0)
    module = Stubborn(**options)
    nn.init.constant_(module.net.head.bias, 0.0)
    module.net.head.bias.data[1] = 5.0  # always the second class
    return module


def run(folder: Path, monitor: BiasMonitor, epochs: int = 4, module: Any = None) -> Any:
    trainer = quiet_trainer(folder, [monitor], logger=csv_logger(folder), max_epochs=epochs)
    return fit(module or unfair(), trainer, loader(16), loader(64, seed=1))


def test_decisions_have_their_finding_and_one_validation_later_their_effect(tmp_path: Path) -> None:
    monitor = BiasMonitor(feedback=[Noting()], min_support=5, patience=None)
    run(tmp_path, monitor, 2)
    first, last = (entry["decisions"][0] for entry in monitor.ledger)
    assert first["feedback"] == "Noting"
    assert first["finding"]["kind"] == "class"
    assert first["finding"]["where"] == "0"
    assert first["finding"]["size"] == 1.0
    assert (first["old"], first["new"], first["dry_run"]) == (0.0, 1.0, False)
    assert first["effect"] == 0.0
    assert last["effect"] is None
    assert monitor.ledger[0]["time"] > 1.7e9


def test_file_holds_a_line_a_decision(tmp_path: Path) -> None:
    monitor = BiasMonitor(feedback=[Noting()], min_support=5, patience=None)
    run(tmp_path, monitor, 3)
    lines = [json.loads(line) for line in (tmp_path / "run/attention/ledger.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["action"], line["effect"]) for line in lines] == [
        (0, "noted", 0.0),
        (1, "noted", 0.0),
        (2, "noted", None),
    ]


def test_what_does_not_help_is_withdrawn_and_not_asked_again(tmp_path: Path) -> None:
    noting = Noting()
    monitor = BiasMonitor(feedback=[noting], min_support=5, patience=2)
    run(tmp_path, monitor, 6)
    actions = [[decision["action"] for decision in entry["decisions"]] for entry in monitor.ledger]
    assert actions[:2] == [["noted"], ["noted"]]
    assert actions[2][0].startswith("withdrawn: in 2 validations")
    assert actions[3:] == [[], [], []]
    assert len(noting.states) == 3
    assert noting.withdrawn


def test_withdrawn_weights_are_those_before_the_run(tmp_path: Path) -> None:
    monitor = BiasMonitor(feedback=[ClassReweighting(by="group", min_support=2)], min_support=5, patience=2)
    module = run(tmp_path, monitor, 4)
    assert monitor.feedback[0].withdrawn
    assert torch.equal(module.criterion.class_weight, torch.ones(4, 2))
    assert "1.00 ->" in monitor.ledger[0]["decisions"][0]["action"]


def test_a_withdrawal_survives_resuming(tmp_path: Path) -> None:
    monitor = BiasMonitor(feedback=[Noting()], min_support=5, patience=1)
    run(tmp_path, monitor, 3)
    resumed = BiasMonitor(feedback=[Noting()], min_support=5, patience=1)
    resumed.load_state_dict(monitor.state_dict())
    assert resumed.feedback[0].withdrawn
    assert resumed.ledger == monitor.ledger


def test_trials_survive_resuming(tmp_path: Path) -> None:
    saved = BiasMonitor(feedback=[Noting()], min_support=5, patience=3)
    run(tmp_path, saved, 3)
    resumed = BiasMonitor(feedback=[Noting()], min_support=5, patience=3)
    resumed.load_state_dict(saved.state_dict())
    assert resumed.state_dict()["ledger"]["trials"] == saved.state_dict()["ledger"]["trials"] != {}


def test_a_further_run_of_the_same_module_goes_on_and_another_module_starts_anew(tmp_path: Path) -> None:
    monitor = BiasMonitor(feedback=[Noting()], min_support=5, patience=1)
    module = run(tmp_path / "first", monitor, 3)
    run(tmp_path / "second", monitor, 2, module)
    assert monitor.feedback[0].withdrawn
    assert len(monitor.ledger) == 5
    run(tmp_path / "other", monitor, 1)
    assert not monitor.feedback[0].withdrawn
    assert [decision["action"] for entry in monitor.ledger for decision in entry["decisions"]] == ["noted"]


def test_what_was_withdrawn_does_not_act_before_it_is_held(tmp_path: Path) -> None:
    class Written(Noting):
        changes = 0

        def _acting_changed(self) -> None:
            self.changes += self.acting

    feedback = Written()
    feedback.withdraw()
    run(tmp_path, BiasMonitor(feedback=[feedback], dry_run=True), 1)
    assert feedback.changes == 0


def test_guidance_that_is_always_on_says_so_once(tmp_path: Path) -> None:
    monitor = BiasMonitor(feedback=[AttentionGuidance(control=False)], min_support=5, patience=None)
    run(tmp_path, monitor, 2)
    actions = [decision["action"] for entry in monitor.ledger for decision in entry["decisions"]]
    assert actions == ["on from the start (always)"]


def test_feedback_that_returns_nothing_is_named(tmp_path: Path) -> None:
    class Silent(Noting):
        def apply(self, report: BiasReport) -> Any:
            return None

    with pytest.raises(MisconfigurationException, match=r"`Silent.apply` must return a list of `Action`.*None"):
        run(tmp_path, BiasMonitor(feedback=[Silent()]), 1)


def test_weights_on_top_of_a_sampler_of_ones_own_are_told(tmp_path: Path) -> None:
    data, more = Texts(64), torch.ones(4, 2)
    more[1, 0] = more[2, 1] = 9.0  # the cells in which the shortcut misleads are rare
    sampler = DynamicDistributedSampler(data.labels, groups=data.group)
    sampler.set_cell_weights(more)
    monitor, module = BiasMonitor(feedback=[Noting()], min_support=2), unfair()
    module.criterion.class_weight.copy_(more)
    trainer = quiet_trainer(tmp_path, [monitor], max_epochs=1)
    with pytest.warns(UserWarning, match="corrected more than once"):
        fit(module, trainer, DataLoader(data, 8, sampler=sampler), loader(64, seed=1))
    assert monitor.ledger[0]["note"]


def test_a_dry_run_trains_as_without_feedback_and_says_what_it_would_do(tmp_path: Path) -> None:
    def weights(monitor: BiasMonitor | None, folder: Path) -> Any:
        torch.manual_seed(0)
        module, callbacks = Classifier(), [monitor] if monitor else []
        trainer = quiet_trainer(folder, callbacks, max_epochs=3)
        fit(module, trainer, loader(32), loader(64, seed=1))
        return module.state_dict()

    dry = BiasMonitor(feedback="automatic", min_support=5, dry_run=True)
    plain, found = weights(None, tmp_path / "plain"), weights(dry, tmp_path / "dry")
    assert all(torch.equal(value, plain[name]) for name, value in found.items() if name in plain)
    decisions = [decision for entry in dry.ledger for decision in entry["decisions"]]
    assert decisions
    assert all(decision["dry_run"] for decision in decisions)
    assert any("ClassReweighting" in decision["feedback"] for decision in decisions)


def test_patience_must_be_positive() -> None:
    with pytest.raises(ValueError, match="`patience`"):
        BiasMonitor(patience=0)


def test_data_of_the_test_is_as_described() -> None:
    assert 10 < int(Texts(64, seed=1).labels.sum()) < 54
