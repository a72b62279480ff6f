"""Every feedback, in whole runs: it acts, resumes to the last bit, goes with what Trainers do, and leaves nothing."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from attn_callbacks import BiasMonitor, Feedback
from attn_callbacks._lightning import MisconfigurationException
from tests.callbacks.feeding import CASES, Data, Run, run
from tests.callbacks.models import WIDTH, Classifier, leftovers, quiet_trainer

every = pytest.mark.parametrize("name", CASES)


def differing(first: dict[str, Any], second: dict[str, Any]) -> set[str]:
    return {name for name in first.keys() & second.keys() if not torch.equal(first[name], second[name])}


def buffers(module: torch.nn.Module, name: str) -> list[torch.Tensor]:
    return [value for path, value in module.named_buffers() if path.rpartition(".")[2] == name]


def timeless(monitor: BiasMonitor) -> list[dict[str, Any]]:
    return [{name: value for name, value in entry.items() if name != "time"} for entry in monitor.ledger]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Unbroken runs, each made once."""
    runs: dict[str, Run] = {}

    def made(name: str) -> Run:
        if name not in runs:
            runs[name] = run(CASES[name], tmp_path_factory.mktemp("whole"))
        return runs[name]

    return made


@every
def test_feedback_acts_and_training_differs(name: str, whole: Any, tmp_path: Path) -> None:
    held = run(CASES[name], tmp_path, dry_run=True)
    assert differing(whole(name).weights, held.weights)


@every
def test_a_dry_run_is_a_run_without_feedback(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    held = run(case, tmp_path / "held", epochs=2, dry_run=True)
    plain = run(case._replace(feedback=StillFeedback), tmp_path / "plain", epochs=2)
    assert differing(plain.weights, held.weights) == set()
    for buffer in ("class_weight", "adjustment", "masks"):
        for mine, other in zip(buffers(plain.module, buffer), buffers(held.module, buffer), strict=True):
            assert torch.equal(mine, other)


@every
def test_resumed_run_is_bitwise_the_unbroken_one(name: str, whole: Any, tmp_path: Path) -> None:
    run(CASES[name], tmp_path / "half", epochs=2)
    resumed = run(CASES[name], tmp_path / "rest", checkpoint=tmp_path / "half" / "last.ckpt")
    assert differing(whole(name).weights, resumed.weights) == set()
    assert timeless(resumed.monitor) == timeless(whole(name).monitor)
    states = [repr(each.monitor.state_dict()["feedback"]) for each in (whole(name), resumed)]
    assert states[0] == states[1]


@every
def test_nothing_is_left_in_the_module(name: str, whole: Any) -> None:
    module = whole(name).module
    assert leftovers(module) == {}
    assert not any("forward" in vars(part) for part in module.modules())
    pickle.dumps(copy.deepcopy(module))


@every
def test_accumulation_half_precision_and_rebuilt_loaders(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # CPU autocast breaks the native path of nn.TransformerEncoder
    monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)
    options = {"accumulate_grad_batches": 2, "precision": "bf16-mixed", "reload_dataloaders_every_n_epochs": 1}
    found = run(CASES[name], tmp_path, epochs=3, **options)
    assert all(value.isfinite().all() for value in found.weights.values())
    assert len(found.monitor.ledger) == 3


@every
def test_a_pickled_monitor_has_the_same_feedback(name: str) -> None:
    monitor = BiasMonitor(feedback=[CASES[name].feedback()])
    twin = pickle.loads(pickle.dumps(monitor))
    assert repr(twin.feedback) == repr(monitor.feedback)
    assert twin.state_key == monitor.state_key


@every
def test_manual_optimisation_is_refused_in_a_sentence(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    module = case.module()
    module.automatic_optimization = False
    monitor = BiasMonitor(feedback=[case.feedback()])
    with pytest.raises(MisconfigurationException, match="needs automatic optimization"):
        quiet_trainer(tmp_path, [monitor]).fit(module, datamodule=Data(case))


@every
def test_a_module_without_what_is_needed_is_refused_before_training(name: str, tmp_path: Path) -> None:
    module = torch.nn.Linear(WIDTH, 2)
    feedback = CASES[name].feedback()
    needs_nothing = ("Adversarial", "Attention", "InputGradient", "MaskRandom", "RandomRationale", "Resampling")
    with nullcontext() if name.startswith(needs_nothing) else pytest.raises(ValueError, match="`"):
        feedback.bind(module)


def test_resampling_without_its_sampler_is_refused(tmp_path: Path) -> None:
    monitor = BiasMonitor(feedback=[CASES["Resampling"].feedback()])
    with pytest.raises(MisconfigurationException, match="DynamicDistributedSampler"):
        quiet_trainer(tmp_path, [monitor]).fit(Classifier(), datamodule=Data(CASES["AttentionGuidance"]))


def test_resampling_gives_rebuilt_loaders_the_same_weights(tmp_path: Path) -> None:
    kept = run(CASES["Resampling"], tmp_path / "kept")
    rebuilt = run(CASES["Resampling"], tmp_path / "rebuilt", reload_dataloaders_every_n_epochs=1)
    assert differing(kept.weights, rebuilt.weights) == set()


class StillFeedback(Feedback):
    """Does nothing."""

    def apply(self, report: Any) -> list[Any]:
        return []
