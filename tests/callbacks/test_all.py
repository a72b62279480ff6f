"""What every callback does alike: the battery of section 2.7 of the house style."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from attn_callbacks import BatchSchema, HeadRoles, HeadStatistics, TrainingHealth, callbacks
from attn_callbacks._lightning import Callback
from tests.callbacks.models import (
    DRAWING,
    REGISTRY,
    STATEFUL,
    BagOfWords,
    Classifier,
    EncoderDecoder,
    TextEncoder,
    Texts,
    board_logger,
    csv_logger,
    feeding_monitor,
    fit,
    leftovers,
    loader,
    pair_loader,
    pl,
    quiet_trainer,
    watchable,
)
from tests.callbacks.test_writer import writer_threads

each = pytest.mark.parametrize("name", sorted(REGISTRY))
each_drawing = pytest.mark.parametrize("name", DRAWING)


def test_registry_is_complete() -> None:
    public = {name for name in callbacks.__all__ if issubclass(getattr(callbacks, name), Callback)}
    assert public == set(REGISTRY) == set(callbacks.__all__)


def found(callback: Any) -> Any:
    """What a callback found in its last run, whichever it is."""
    return getattr(callback, "report", None) or getattr(callback, "result", None)


def traces(name: str, trainer: Any, folder: Path) -> list[Any]:
    """What shows that a callback did its work: pictures, or numbers for who draws none."""
    pictures: list[Any] = list(folder.glob("**/*.png"))
    return pictures if name in DRAWING else [key for key in trainer.callback_metrics if key.startswith("health/")]


@each
def test_two_fits_with_one_instance(name: str, tmp_path: Path) -> None:
    callback = REGISTRY[name]()
    for run in ("first", "second"):
        trainer = quiet_trainer(tmp_path / run, [callback], logger=csv_logger(tmp_path / run))
        module = fit(watchable(name), trainer)
        assert leftovers(module) == {}
        assert writer_threads() == []
        assert traces(name, trainer, tmp_path / run)


@each_drawing
def test_validate_test_and_predict(name: str, tmp_path: Path) -> None:
    module, data = watchable(name), loader(16)
    trainer = quiet_trainer(tmp_path, [REGISTRY[name]()], logger=csv_logger(tmp_path))
    trainer.test(module, data, verbose=False)
    trainer.predict(module, data)
    assert not list(tmp_path.glob("**/*.png"))
    trainer.validate(module, data, verbose=False)
    assert list(tmp_path.glob("**/*.png"))
    assert leftovers(module) == {}
    assert writer_threads() == []


@pytest.mark.parametrize("name", [name for name in DRAWING if REGISTRY[name]()._needs_logger])
def test_observer_without_logger_warns_once_and_stays_inert(name: str, tmp_path: Path) -> None:
    callback = REGISTRY[name]()
    trainer = quiet_trainer(tmp_path, [callback], max_epochs=2)
    with pytest.warns(UserWarning, match="no logger to write to and stays inert") as caught:
        fit(watchable(name), trainer)
    assert len([warning for warning in caught if "stays inert" in str(warning.message)]) == 1
    assert found(callback) is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [name for name in DRAWING if not REGISTRY[name]()._needs_logger])
def test_who_keeps_a_result_goes_on_without_logger(name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    callback = REGISTRY[name]()
    fit(watchable(name), quiet_trainer(tmp_path, [callback]))
    assert found(callback) is not None
    assert not list(tmp_path.iterdir())
    assert not [warning for warning in recwarn if name in str(warning.message)]


def test_bias_monitor_goes_on_without_logger(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    monitor = REGISTRY["BiasMonitor"]()
    trainer = quiet_trainer(tmp_path, [monitor])
    fit(Classifier(), trainer)
    assert monitor.report.epoch == 0
    assert "bias/gap" in trainer.callback_metrics
    assert not list(tmp_path.iterdir())
    assert not [warning for warning in recwarn if "BiasMonitor" in str(warning.message)]


@each
def test_fast_dev_run_is_silent(name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    trainer = quiet_trainer(tmp_path, [REGISTRY[name]()], logger=csv_logger(tmp_path), fast_dev_run=True)
    fit(watchable(name), trainer)
    assert [type(logger).__name__ for logger in trainer.loggers] == ["DummyLogger"]
    assert not [warning for warning in recwarn if name in str(warning.message)]
    assert not list(tmp_path.iterdir())


@each
def test_sanity_check_leaves_nothing(name: str, tmp_path: Path) -> None:
    callback, seen = REGISTRY[name](), []

    class Look(pl.Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            seen.append((found(callback), [*tmp_path.glob("**/*.png"), *tmp_path.glob("**/attention")]))
            seen.append(dict(trainer.callback_metrics))

    fit(
        watchable(name),
        quiet_trainer(tmp_path, [callback, Look()], logger=csv_logger(tmp_path), num_sanity_val_steps=2),
    )
    assert seen == [(None, []), {}]


@each
def test_two_instances_in_one_trainer(name: str, tmp_path: Path) -> None:
    one = REGISTRY[name]()
    others = {"BiasMonitor": feeding_monitor, "HeadRoles": lambda: HeadRoles(layers=["*.0.*"])}
    others["TrainingHealth"] = lambda: TrainingHealth(every_n_steps=3)
    trainer = quiet_trainer(tmp_path, [one, others.get(name, REGISTRY[name])()], logger=csv_logger(tmp_path))
    assert leftovers(fit(watchable(name), trainer)) == {}
    assert traces(name, trainer, tmp_path)


@pytest.mark.parametrize("name", sorted(STATEFUL))
def test_two_equal_stateful_ones_are_refused_by_lightning(name: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        quiet_trainer(tmp_path, [REGISTRY[name](), REGISTRY[name]()])


def test_who_has_state_is_listed() -> None:
    empty = {name for name, make in REGISTRY.items() if type(make()).state_dict is Callback.state_dict}
    assert empty == set(REGISTRY) - STATEFUL


@each
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda callback: pickle.loads(pickle.dumps(callback))])
def test_copies_keep_the_arguments_only(name: str, copied: Any, tmp_path: Path) -> None:
    callback = REGISTRY[name]()
    fit(watchable(name), quiet_trainer(tmp_path, [callback], logger=csv_logger(tmp_path)))
    twin = copied(callback)
    assert repr(twin) == repr(callback)
    assert found(twin) is None
    assert set(vars(twin)) == set(vars(REGISTRY[name]()))
    trainer = quiet_trainer(tmp_path / "twin", [twin], logger=csv_logger(tmp_path / "twin"))
    fit(watchable(name), trainer)
    assert traces(name, trainer, tmp_path / "twin")


def test_repr_shows_what_was_given() -> None:
    schema = BatchSchema(target="y")
    assert repr(HeadStatistics(schema, rows=8)) == "HeadStatistics(schema=BatchSchema(target='y'), rows=8)"
    assert [repr(make()) for make in REGISTRY.values()] == [
        "AlignmentMonitor()",
        "AttentionHeatmaps(samples=2)",
        "AttentionPaths(samples=2)",
        "BiasMonitor()",
        "ErrorAnalysis(samples=2)",
        "HeadImportance()",
        "HeadRoles()",
        "HeadStatistics()",
        "TrainingHealth(every_n_steps=2)",
    ]


@each
def test_every_argument_is_kept_under_its_name(name: str) -> None:
    callback = REGISTRY[name]()
    missing = [p for p in inspect.signature(type(callback)).parameters if not hasattr(callback, p)]
    assert missing == []


OPTIONS: dict[str, dict[str, Any]] = {
    "accumulation": {"accumulate_grad_batches": 2},
    "bf16": {"precision": "bf16-mixed"},
    "half epochs": {"val_check_interval": 0.5},
    "overfitting": {"overfit_batches": 2},
}


@each_drawing
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_trainer_options(name: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", False)  # CPU autocast breaks native encoders
    callback = REGISTRY[name]()
    module = fit(watchable(name), quiet_trainer(tmp_path, [callback], logger=csv_logger(tmp_path), **options))
    pictures = {path.name.split("_step")[1] for path in tmp_path.glob("**/*.png")}
    steps = {"accumulation": {"2"}, "bf16": {"4"}, "half epochs": {"2", "4"}, "overfitting": {"2"}}
    assert pictures == {f"{step}.png" for step in steps[next(k for k, v in OPTIONS.items() if v is options)]}
    assert leftovers(module) == {}


@each_drawing
def test_no_validation_batches(name: str, tmp_path: Path) -> None:
    callback = REGISTRY[name]()
    fit(watchable(name), quiet_trainer(tmp_path, [callback], logger=csv_logger(tmp_path), limit_val_batches=0))
    assert found(callback) is None
    assert not list(tmp_path.glob("**/*.png"))


@each_drawing
def test_only_the_first_validation_loader_counts(name: str, tmp_path: Path) -> None:
    def run(validation: Any, folder: Path) -> Any:
        torch.manual_seed(0)
        callback = REGISTRY[name]()
        fit(watchable(name), quiet_trainer(folder, [callback], logger=csv_logger(folder)), validation=validation)
        return callback, {path.name: path.read_bytes() for path in folder.glob("**/*.png")}

    one, pictures = run(loader(16, seed=1), tmp_path / "one")
    two, others = run([loader(16, seed=1), loader(24, seed=5)], tmp_path / "two")
    assert pictures
    assert others == pictures
    if name == "BiasMonitor":
        assert torch.equal(one.report.counts, two.report.counts)
    if name == "HeadStatistics":
        assert torch.equal(one.result.samples, two.result.samples)


class ManualClassifier(Classifier):
    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


@each_drawing
def test_manual_optimization(name: str, tmp_path: Path) -> None:
    fit(ManualClassifier(watchable(name).net), quiet_trainer(tmp_path, [REGISTRY[name]()], logger=csv_logger(tmp_path)))
    assert list(tmp_path.glob("**/*.png"))


@pytest.mark.parametrize("name", [name for name in DRAWING if name != "BiasMonitor"])  # it looks at answers as well
def test_model_without_attention_warns_once(name: str, tmp_path: Path) -> None:
    module, trainer = (
        Classifier(BagOfWords()),
        quiet_trainer(tmp_path, [REGISTRY[name]()], logger=csv_logger(tmp_path), max_epochs=2),
    )
    with pytest.warns(UserWarning, match="is switched off for the rest of this run.*No attention was seen") as caught:
        fit(module, trainer, pair_loader(16), pair_loader(16))
    assert len([warning for warning in caught if "switched off" in str(warning.message)]) == 1
    assert trainer.current_epoch == 2
    assert leftovers(module) == {}


@each_drawing
def test_unknown_layer_warns_and_names_the_known(name: str, tmp_path: Path) -> None:
    callback = type(REGISTRY[name]())(layers=["nonsense"])
    with pytest.warns(UserWarning, match="'nonsense'. Known: 'net.(model.)?encoder.layers.0"):
        fit(watchable(name), quiet_trainer(tmp_path, [callback], logger=csv_logger(tmp_path)))


@pytest.mark.parametrize("name", sorted({*DRAWING} - {"AlignmentMonitor", "HeadImportance"}))  # which read no `valid`
def test_schema_that_does_not_fit_warns_and_training_goes_on(name: str, tmp_path: Path) -> None:
    trainer = quiet_trainer(
        tmp_path,
        [type(REGISTRY[name]())(schema=BatchSchema(valid="padding"))],
        logger=csv_logger(tmp_path),
    )
    with pytest.warns(UserWarning, match="`valid` reads 'padding' of the batch, which has 'input_ids'"):
        fit(watchable(name), trainer)
    assert trainer.current_epoch == 1


def test_cross_attention(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, [make() for make in REGISTRY.values()], logger=csv_logger(tmp_path))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*switched off")
        fit(Classifier(EncoderDecoder()), trainer, pair_loader(16), pair_loader(16))
    drawn = {path.parent.name for path in tmp_path.glob("**/attention/sample_0/*.png")} | {
        path.name.split("_step")[0] for path in tmp_path.glob("**/attention/sample_0/*.png")
    }
    assert "net.model.decoder.layers.0.multihead_attn" in drawn
    assert trainer.callback_metrics["heads/distance_mean"] > 0


# --- nothing survives --------------------------------------------------------------------------------------------


class Failing(Classifier):
    """Raises ``error`` inside the second ``step``."""

    def __init__(self, step: str, error: BaseException, net: nn.Module | None = None) -> None:
        super().__init__(net)
        self.failing_step, self.error, self.armed, self.fail_from = step, error, True, 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return self.fail("training_step", batch_idx) or loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        super().validation_step(batch, batch_idx)
        self.fail("validation_step", batch_idx)

    def fail(self, step: str, batch_idx: int) -> None:
        if self.armed and (step, batch_idx) == (self.failing_step, 1) and self.current_epoch >= self.fail_from:
            raise self.error


@pytest.mark.parametrize("step", ["training_step", "validation_step"])
@pytest.mark.parametrize("error", [RuntimeError("out of luck"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_nothing_survives_an_exception(step: str, error: BaseException, tmp_path: Path) -> None:
    observers = [make() for name, make in REGISTRY.items() if name not in ("AlignmentMonitor", "BiasMonitor")]
    module, monitor = Failing(step, error), feeding_monitor()
    trainer = quiet_trainer(tmp_path, [*observers, monitor], logger=csv_logger(tmp_path))
    with pytest.raises((RuntimeError, KeyboardInterrupt, SystemExit)):
        fit(module, trainer)
    assert leftovers(module) == {}
    assert writer_threads() == []

    module.armed = False
    again = quiet_trainer(tmp_path / "again", [*observers, monitor], logger=csv_logger(tmp_path / "again"))
    fit(module, again)
    assert leftovers(module) == {}
    assert monitor.report is not None
    assert list(tmp_path.glob("again/**/*.png"))


def test_nothing_of_a_run_is_kept_after_it(tmp_path: Path) -> None:
    import gc
    import weakref

    callbacks = [make() for make in REGISTRY.values()]
    module = Classifier()
    trainer = quiet_trainer(tmp_path, callbacks, logger=csv_logger(tmp_path))
    fit(module, trainer)
    gone = weakref.ref(module)
    for callback in callbacks:
        vars(callback).pop("log", None)  # Lightning's own
        vars(callback).pop("log_dict", None)
    del module, trainer
    gc.collect()
    assert gone() is None


# --- observers change nothing ------------------------------------------------------------------------------------


def trained(
    callbacks: list[Any], folder: Path, name: str = "HeadStatistics", **options: Any
) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    module = watchable(name, dropout=0.2)
    data = DataLoader(Texts(88), 8, shuffle=True)
    trainer = quiet_trainer(folder, callbacks, logger=csv_logger(folder), max_epochs=2, **options)
    fit(module, trainer, data, loader(24, seed=1))
    assert trainer.global_step == 22
    return {**module.state_dict(), "draw": torch.rand(3)}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return trained([], tmp_path_factory.mktemp("plain"), val_check_interval=0.5)


@each
def test_observers_leave_training_bit_identical(name: str, plain: dict[str, torch.Tensor], tmp_path: Path) -> None:
    if name == "AlignmentMonitor":
        plain = trained([], tmp_path / "plain", name, val_check_interval=0.5)
    watched = trained([REGISTRY[name]()], tmp_path, name, val_check_interval=0.5)
    assert list(tmp_path.glob("**/*.png")) or name not in DRAWING
    assert {key for key, value in plain.items() if not torch.equal(value, watched[key])} == set()


def test_exact_statistics_leave_training_bit_identical(plain: dict[str, torch.Tensor], tmp_path: Path) -> None:
    statistics = HeadStatistics(rows=4, mode="exact")
    watched = trained([statistics], tmp_path, val_check_interval=0.5)
    assert statistics.result is not None
    assert {key for key, value in plain.items() if not torch.equal(value, watched[key])} == set()


def test_feedback_does_change_training(plain: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """The test above would pass if nothing were compared; this one would not."""
    changed = trained([feeding_monitor()], tmp_path, val_check_interval=0.5)
    assert not torch.equal(plain["net.head.weight"], changed["net.head.weight"])


# --- models that are wrapped -------------------------------------------------------------------------------------


def test_compiled_steps_are_not_compiled_again(tmp_path: Path) -> None:
    from torch._dynamo.testing import CompileCounter

    def compilations(callbacks: list[Any], folder: Path) -> int:
        torch._dynamo.reset()
        counter, module = CompileCounter(), Classifier()
        module.net.head = torch.compile(module.net.head, backend=counter)
        module.net.embed = torch.compile(module.net.embed, backend=counter)
        fit(module, quiet_trainer(folder, callbacks, logger=board_logger(folder), max_epochs=3))
        return counter.frame_count

    expected = compilations([], tmp_path / "plain")
    assert expected > 0
    watched = [REGISTRY["AttentionHeatmaps"](), REGISTRY["HeadStatistics"]()]
    # a validation that is watched runs eagerly, so that only the graphs of training are ever made
    assert compilations(watched, tmp_path / "watched") <= expected


def test_compiled_module(tmp_path: Path) -> None:
    class Silent(Classifier):  # Lightning cannot log inside a compiled module on torch 2.13
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return {"logits": self(batch)}

    module = Silent()
    monitor = REGISTRY["BiasMonitor"]()
    trainer = quiet_trainer(tmp_path, [monitor, REGISTRY["HeadStatistics"]()], logger=csv_logger(tmp_path))
    fit(torch.compile(module, backend="eager"), trainer)
    assert int(monitor.report.support.sum()) == 16
    assert list(tmp_path.glob("**/heads/*.png"))
    assert "TappedStep" not in repr([vars(module)["training_step"], vars(module)["validation_step"]])


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_counts_once(reentrant: bool, tmp_path: Path) -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(TextEncoder):
        def hidden(self, tokens: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
            hidden = self.embed(tokens)
            for layer in self.encoder.layers:
                hidden = checkpoint(
                    lambda h, at=layer: at(h, src_key_padding_mask=padding), hidden, use_reentrant=reentrant
                )
            return hidden

    statistics = REGISTRY["HeadStatistics"]()
    fit(Classifier(Checkpointed()), quiet_trainer(tmp_path, [statistics], logger=csv_logger(tmp_path)))
    assert statistics.layer_names == ("net.encoder.layers.0.self_attn", "net.encoder.layers.1.self_attn")
    assert int(statistics.result.samples.max()) == 16


def test_weight_averaging_copies_a_watched_module(tmp_path: Path) -> None:
    averaging = pl.callbacks.EMAWeightAveraging(decay=0.5)
    monitor, statistics = feeding_monitor(), REGISTRY["HeadStatistics"]()
    module = Classifier()
    trainer = quiet_trainer(tmp_path, [statistics, monitor, averaging], logger=csv_logger(tmp_path), max_epochs=2)
    fit(module, trainer)
    assert leftovers(module) == {}
    assert len(monitor.ledger) == 2
    assert statistics.result is not None


def test_copy_of_a_watched_module_has_plain_steps(tmp_path: Path) -> None:
    copies = []

    class Copy(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            copies.append(copy.deepcopy(module.net if batch_idx else module))

    module = Classifier()
    fit(module, quiet_trainer(tmp_path, [feeding_monitor(), Copy()], limit_train_batches=1))
    twin = copies[0]
    assert twin.training_step.__self__ is twin
    assert isinstance(twin, nn.Module)
    assert twin is not module


def test_generation_steps_are_left_out(tmp_path: Path) -> None:
    class Generating(Classifier):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            self(batch)
            one = torch.zeros(len(batch["labels"]), 1, dtype=torch.long)
            for _ in range(5):
                self.net.hidden(one, None)

    statistics = REGISTRY["HeadStatistics"]()
    fit(Generating(), quiet_trainer(tmp_path, [statistics], logger=csv_logger(tmp_path)))
    assert statistics.layer_names == ("net.encoder.layers.0.self_attn", "net.encoder.layers.1.self_attn")
