"""Every feedback, in whole runs: it acts, resumes to the last bit, goes with what Trainers do, and leaves nothing."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from attn_callbacks import (
    AttentionGuidance,
    BatchSchema,
    BiasMonitor,
    DynamicDistributedSampler,
    Feedback,
    RandomRationaleControl,
)
from attn_callbacks._lightning import MisconfigurationException
from attn_callbacks.bias import BiasReport
from attn_callbacks.callbacks._bias_loop import BiasLoop
from attn_callbacks.callbacks._fed_failures import FedFailures
from attn_callbacks.feedback import StepFeedback
from tests.callbacks.feeding import CASES, Case, Data, Run, run
from tests.callbacks.models import VOCABULARY, WIDTH, Classifier, leftovers, loader, pl, quiet_trainer

SAME = BiasReport(0, 0, torch.tensor([[[90, 10], [60, 40]]]), ("0", "1"))


class Bag(torch.nn.Module):
    """No attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(VOCABULARY, WIDTH), torch.nn.Linear(WIDTH, 2)

    def forward(self, batch: Any) -> torch.Tensor:
        return self.head(self.embed(batch["input_ids"]).mean(dim=1))


every = pytest.mark.parametrize("name", CASES)


def differing(first: dict[str, Any], second: dict[str, Any]) -> set[str]:
    return {name for name in first.keys() & second.keys() if not torch.equal(first[name], second[name])}


def reseeded(case: Case) -> Case:
    """The same weights, and another seed for all that is random in the run."""

    def module() -> Any:
        made = case.module()
        torch.manual_seed(1)
        return made

    return case._replace(module=module)


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
    resumed = run(reseeded(CASES[name]), tmp_path / "rest", checkpoint=tmp_path / "half" / "last.ckpt")
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


def test_a_resumed_trial_withdraws_as_the_unbroken_one(tmp_path: Path) -> None:
    case = CASES["ClassReweighting"]._replace(feedback=Useless)
    unbroken = run(case, tmp_path / "whole", epochs=4, patience=2)
    run(case, tmp_path / "half", epochs=2, patience=2)
    resumed = run(case, tmp_path / "rest", checkpoint=tmp_path / "half" / "last.ckpt", patience=2)
    assert [entry["decisions"] for entry in resumed.monitor.ledger][2] != []
    assert timeless(resumed.monitor) == timeless(unbroken.monitor)


class Useless(Feedback):
    """Claims the same finding in every report."""

    answers = frozenset({"class"})

    def answered(self, report: Any) -> Any:
        return tuple(dataclasses.replace(each, size=-10.0) for each in SAME.findings)

    def apply(self, report: Any) -> list[Any]:
        return []


class Failing(StepFeedback):
    """Switches itself on, or is on, and cannot do its part."""

    answers = frozenset({"class", "feature", "group"})
    sees = frozenset({"attention"})

    def __init__(self, when: str, error: Exception | None) -> None:
        self.when, self.error, self._on = when, error, when == "always"

    @property
    def active(self) -> bool:
        return self.acting and self._on

    def term(self, step: Any) -> Any:
        if self.error is not None:
            raise self.error

    def apply(self, report: Any) -> list[Any]:
        self._on = True
        return []


class Changing(Failing):
    """Fails before the step."""

    sees = frozenset()

    def change_inputs(self, inputs: Any, step: Any) -> Any:
        return self.term(step)


FAILURES = [
    RuntimeError("found no self-attention over the marks"),
    ValueError("wrong shape"),
    KeyError("no marks"),
]


def fail(feedback: Feedback, folder: Path, net: Any = None, epochs: int = 3, **options: Any) -> Run:
    case = Case(lambda: feedback, lambda: Classifier(net and net()))
    return run(case, folder, epochs=epochs, **options)


@pytest.mark.parametrize("kind", [Failing, Changing])
@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_what_switched_itself_on_and_fails_is_withdrawn(kind: Any, error: Exception, tmp_path: Path) -> None:
    feedback = kind("biased", error)
    with pytest.warns(UserWarning, match=f"`{kind.__name__}` cannot take part.*{error.args[0]}") as warned:
        found = fail(feedback, tmp_path)
    assert feedback.withdrawn
    assert found.trainer.current_epoch == 3
    assert sum("cannot take part" in str(each.message) for each in warned) == 1
    assert f"withdrawn: `{kind.__name__}` cannot" in found.monitor.ledger[0]["decisions"][0]["action"]


@pytest.mark.parametrize("kind", [Failing, Changing])
@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_what_was_asked_for_and_fails_ends_training(kind: Any, error: Exception, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=error.args[0]):
        fail(kind("always", error), tmp_path)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), ZeroDivisionError("no")])
def test_other_errors_are_left_as_they_are(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)):
        fail(Failing("biased", error), tmp_path)


def test_a_model_without_attention_trains_on_without_the_feedback(tmp_path: Path) -> None:
    feedback = AttentionGuidance(when="biased", control=False)
    feedback._on = True
    with pytest.warns(UserWarning, match="cannot take part in training. AttentionNotFoundError"):
        found = fail(feedback, tmp_path / "found", Bag, epochs=1)
    assert feedback.withdrawn
    assert leftovers(found.module) == {}
    plain = fail(StillFeedback(), tmp_path / "plain", Bag, epochs=1)
    assert differing(found.weights, plain.weights) == set()  # the first step is not lost
    with pytest.raises(MisconfigurationException, match="attention"):
        fail(AttentionGuidance(), tmp_path / "asked", Bag, epochs=1)


def test_errors_of_the_step_itself_are_not_the_feedback_s(tmp_path: Path) -> None:
    class Broken(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise ValueError("my own")

    feedback = Failing("biased", None)
    feedback._on = True
    with pytest.raises(ValueError, match="my own"):
        run(Case(lambda: feedback, Broken), tmp_path, epochs=1)
    assert not feedback.withdrawn


def test_everything_automatic_is_withdrawn_and_not_refused() -> None:
    entered: list[str] = []
    feedback = Failing("always", None)
    failures = FedFailures(lambda each, text: entered.append(text), automatic=True)
    with pytest.warns(UserWarning, match="cannot take part"), failures.of([feedback]):
        raise KeyError("no marks")
    assert feedback.withdrawn
    assert entered == ["withdrawn: `Failing` cannot take part in training. KeyError: no marks"]


def test_one_process_of_several_does_not_withdraw_alone() -> None:
    feedback = Failing("biased", None)
    with pytest.raises(MisconfigurationException), FedFailures(lambda *_: None, processes=2).of([feedback]):
        raise KeyError("no marks")


def idle(tmp_path: Path, feedback: Feedback, **options: Any) -> Run:
    return fail(feedback, tmp_path, schema=BatchSchema(spurious=lambda batch: None, relevance=lambda batch: None),
                **options)  # fmt: skip


@pytest.mark.parametrize("control", [False, True])
def test_idle_feedback_that_switched_itself_on_is_withdrawn_with_an_entry(control: bool, tmp_path: Path) -> None:
    guidance = AttentionGuidance(when="biased", control=False)
    guidance._on = True
    with pytest.warns(UserWarning, match="in 6 training steps, so it did nothing"):
        found = idle(tmp_path, RandomRationaleControl(guidance) if control else guidance)
    assert found.monitor.feedback[0].withdrawn
    assert "so it did nothing" in found.monitor.ledger[0]["decisions"][-1]["action"]


def test_part_of_an_epoch_is_no_evidence_that_marks_are_missing(tmp_path: Path) -> None:
    assert idle(tmp_path, AttentionGuidance(control=False), epochs=1, max_steps=2).trainer.global_step == 2
    with pytest.raises(MisconfigurationException, match="in 6 training steps"):
        idle(tmp_path, AttentionGuidance(control=False), epochs=1)


def test_feedback_switched_on_within_an_epoch_is_judged_in_the_next(tmp_path: Path) -> None:
    feedback = Failing("biased", None)
    with pytest.warns(UserWarning, match="in 6 training steps"):
        found = fail(feedback, tmp_path, epochs=2, val_check_interval=3)
    assert [len(entry["decisions"]) for entry in found.monitor.ledger] == [0, 0, 0, 1]


def test_steps_draw_other_numbers_on_every_process_and_in_every_step() -> None:
    def seed(rank: int, step: int, run_seed: int) -> int:
        feedback, module = Seeing(), Classifier()
        loop, trainer = (
            BiasLoop([feedback], BatchSchema(), None, False),
            SimpleNamespace(global_rank=rank, world_size=2),
        )
        (remove,) = loop.start(trainer, module, run_seed)
        loop.start_step(step, 0)
        module.training_step(next(iter(loader(8))), 0)
        remove()
        return feedback.seed

    assert seed(0, 0, 7) == seed(0, 0, 7)
    assert len({seed(0, 0, 7), seed(1, 0, 7), seed(0, 1, 7), seed(0, 0, 8)}) == 4


class Seeing(StepFeedback):
    """Keeps the seed of its random numbers."""

    seed = 0

    def term(self, step: Any) -> Any:
        self.seed = step.generator.initial_seed()

    def apply(self, report: Any) -> list[Any]:
        return []


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


class Automatic(Data):
    """Training data with groups in the sampler, drawn by workers."""

    def train_dataloader(self) -> Any:
        sampler = DynamicDistributedSampler(self.train.labels, groups=self.train.group)
        return DataLoader(self.train, 8, sampler=sampler, num_workers=1)


def automatic(folder: Path, epochs: int, checkpoint: Path | None = None, **options: Any) -> tuple[Any, BiasMonitor]:
    torch.manual_seed(0)
    module, monitor = Classifier(), BiasMonitor(feedback="automatic", **{"min_support": 4, "patience": None, **options})
    ends = pl.callbacks.ModelCheckpoint(str(folder), save_last=True)
    middles = pl.callbacks.ModelCheckpoint(str(folder / "steps"), every_n_train_steps=4, save_top_k=-1)
    trainer = quiet_trainer(folder, [monitor, ends, middles], max_epochs=epochs, enable_checkpointing=True)
    trainer.fit(module, datamodule=Automatic(CASES["Resampling"]), ckpt_path=checkpoint, weights_only=True)
    return module, monitor


@pytest.mark.slow
@pytest.mark.parametrize("support", [4, 10_000], ids=["steered", "natural"])
def test_a_sampler_with_workers_resumes_to_the_last_bit(support: int, tmp_path: Path) -> None:
    whole, _ = automatic(tmp_path / "whole", 3, min_support=support)
    automatic(tmp_path / "half", 2, min_support=support)
    resumed, _ = automatic(tmp_path / "rest", 3, tmp_path / "half" / "last.ckpt", min_support=support)
    assert differing(whole.state_dict(), resumed.state_dict()) == set()


@pytest.mark.slow
def test_a_run_resumes_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    automatic(tmp_path / "whole", 2)
    (checkpoint,) = (tmp_path / "whole" / "steps").glob("*step=8.ckpt")
    _, monitor = automatic(tmp_path / "rest", 3, checkpoint)
    assert monitor.ledger[-1]["epoch"] == 2
