"""TrainingHealth: a planted collapse is told before the loss diverges, a healthy run stays silent, nothing changes."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from attn_callbacks.callbacks import training_health
from attn_callbacks.callbacks._health_record import HealthRecord
from attn_callbacks.callbacks.training_health import TrainingHealth
from attn_callbacks.functional.health import HealthThresholds
from attn_callbacks.functional.vitals import VITALS
from tests.callbacks.board import events
from tests.callbacks.models import (
    BagOfWords,
    Classifier,
    TextEncoder,
    Texts,
    board_logger,
    csv_logger,
    fit,
    leftovers,
    pair_loader,
    pl,
    quiet_trainer,
)

WORDS, WIDTH, LENGTH = 16, 32, 12
NAMES = ("net.layers.0.self_attn", "net.layers.1.self_attn")


class Scale(pl.LightningModule):
    """Tells sentences of high from those of low words; the learning rate grows by ``growth`` a step."""

    def __init__(self, growth: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.places = nn.Embedding(WORDS, WIDTH), nn.Parameter(torch.randn(LENGTH, WIDTH) / 2)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.net = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 2)
        self.growth, self.history = growth, []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        tokens, labels = batch
        loss = F.cross_entropy(self.head(self.net(self.embed(tokens) + self.places).mean(dim=1)), labels)
        self.history.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), 1e-3)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.growth**step)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def sentences(batches: int, seed: int = 0) -> DataLoader[Any]:
    tokens = torch.randint(0, WORDS, (batches * 64, LENGTH), generator=torch.Generator().manual_seed(seed))
    labels = (torch.linspace(-1, 1, WORDS)[tokens].mean(dim=1) > 0).long()
    return DataLoader(TensorDataset(tokens, labels), 64)


def watched(module: Any, folder: Path, *others: Any, batches: int = 130, **options: Any) -> TrainingHealth:
    health = TrainingHealth(every_n_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quiet_trainer(folder, [health, *others], **options).fit(module, sentences(batches))
    return health


def diverged(history: list[float]) -> int:
    """First step whose loss is twice that of guessing, where it stays or from where it goes on to infinity."""
    return next(step for step, loss in enumerate(history) if not loss < 2 * history[0])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_planted_collapse_is_told_before_the_loss_diverges(seed: int, tmp_path: Path) -> None:
    module = Scale(growth=1.06, seed=seed)
    health = watched(module, tmp_path, batches=140)
    end = diverged(module.history)
    told: dict[str, int] = {}
    for step, _, alert in health.found:
        told.setdefault(alert.kind, step)
    assert max(module.history) > 20 * module.history[0]  # it did diverge
    assert told["logit_growth"] < told["entropy_collapse"] < end
    assert told["max_logit"] < end
    assert min(module.history[told["logit_growth"] :][:3]) < module.history[0]  # the loss did not tell yet


@pytest.mark.slow
def test_a_healthy_run_raises_no_alarm(tmp_path: Path) -> None:
    module = Scale()
    health = watched(module, tmp_path, batches=100)
    assert health.found == []
    assert sum(module.history[-10:]) < 0.7 * sum(module.history[:10])  # it did learn


@pytest.mark.slow
def test_early_stopping_ends_the_run_in_time(tmp_path: Path) -> None:
    module = Scale(growth=1.06)
    stopping = pl.callbacks.EarlyStopping("health/alerts", mode="min", divergence_threshold=0.5, patience=1000)
    trainer_options = {"max_epochs": 14, "enable_model_summary": False}
    health = watched(module, tmp_path, stopping, batches=10, **trainer_options)
    assert len(health.found) >= 1
    assert len(module.history) == -(-health.found[0][0] // 10) * 10  # at the end of its epoch
    assert max(module.history[-10:]) < 2 * module.history[0]


def test_each_event_is_told_once_in_the_log_and_in_the_text_of_the_board(tmp_path: Path) -> None:
    health = TrainingHealth(every_n_steps=1, thresholds=HealthThresholds(max_logit=0.01))
    with pytest.warns(UserWarning, match="`TrainingHealth`: max logit in 'net.layers.0.self_attn' at step 1") as told:
        quiet_trainer(tmp_path, [health], logger=board_logger(tmp_path)).fit(Scale(), sentences(5))
    assert [(step, layer, alert.kind) for step, layer, alert in health.found] == [(1, n, "max_logit") for n in NAMES]
    assert sum("max logit" in str(warning.message) for warning in told) == 2
    board = events(tmp_path / "board")
    assert [event.step for event in board.Tensors("health/alert/text_summary")] == [1, 1]
    assert [event.value for event in board.Scalars("health/alerts")] == [2.0] * 5
    assert {"health/entropy_min", "health/max_logit"} <= set(board.Tags()["scalars"])
    assert 0.9 < board.Scalars("health/entropy_min")[0].value < 1


def test_it_measures_what_the_running_step_sees(tmp_path: Path) -> None:
    from attn_callbacks.capture import AttentionRecorder

    module, (tokens, labels) = Scale(), next(iter(sentences(1)))
    expected = []
    with AttentionRecorder(module, on_call=lambda call: expected.append(call.logits().detach().max())):
        module.training_step([tokens, labels], 0)
    health = watched(module, tmp_path, batches=1)
    assert health._highest == pytest.approx(float(torch.stack(expected).max()), rel=1e-5)


@pytest.mark.parametrize(("every", "steps"), [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (7, [0])])
def test_it_looks_at_every_nth_step(every: int, steps: list[int], tmp_path: Path) -> None:
    looked: list[int] = []

    class Counting(Scale):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            if health._vitals == {} and health._due:
                looked.append(batch_idx)
            return super().training_step(batch, batch_idx)

    health = TrainingHealth(every_n_steps=every)
    quiet_trainer(tmp_path, [health]).fit(Counting(), sentences(5))
    assert looked == steps


def weights_after(callbacks: list[Any], folder: Path) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return fit(Classifier(), quiet_trainer(folder, callbacks, max_epochs=2)).state_dict()


def test_training_is_bit_identical(tmp_path: Path) -> None:
    plain, seen = weights_after([], tmp_path), weights_after([TrainingHealth(every_n_steps=1)], tmp_path)
    assert {key for key, value in plain.items() if not torch.equal(value, seen[key])} == set()


class Unmasked(TextEncoder):
    """Attends to padding: only the batch knows of it."""

    def hidden(self, tokens: Tensor, padding: Tensor | None) -> Tensor:
        return super().hidden(tokens, None)


@pytest.mark.parametrize("net", [TextEncoder, Unmasked])
def test_padding_does_not_count(net: type[TextEncoder], tmp_path: Path) -> None:
    health = TrainingHealth(every_n_steps=10)
    fit(Classifier(net()), quiet_trainer(tmp_path, [health]))
    first = health._record._first["net.encoder.layers.0.self_attn"]
    assert first[:, VITALS.index("rows")].tolist() == [float(Texts().attention_mask[:8].sum())] * 2


def test_resuming_goes_on_with_what_was_seen(tmp_path: Path) -> None:
    thresholds = HealthThresholds(max_logit=0.01)
    first, second = (TrainingHealth(every_n_steps=2, thresholds=thresholds) for _ in range(2))
    trainer = quiet_trainer(tmp_path, [first], max_epochs=1)
    with pytest.warns(UserWarning, match="max logit"):
        trainer.fit(Scale(), sentences(5))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        quiet_trainer(tmp_path, [second], max_epochs=2).fit(Scale(), sentences(5), ckpt_path=tmp_path / "last.ckpt")
    assert not [warning for warning in told if "max logit" in str(warning.message)]
    assert second.found == []
    assert (second._steps, second._record.events) == (10, 2)
    layers = second._record.state_dict()["layers"]
    assert [len(recent) for _, recent in layers.values()] == [5, 5]  # steps 0, 2, 4 and 6, 8
    assert layers[NAMES[0]][0] == first._record.state_dict()["layers"][NAMES[0]][0]


def test_without_a_logger_it_still_tells(tmp_path: Path) -> None:
    health = TrainingHealth(thresholds=HealthThresholds(max_logit=0.01))
    trainer = quiet_trainer(tmp_path, [health])
    with pytest.warns(UserWarning, match="max logit"):
        trainer.fit(Scale(), sentences(2))
    assert trainer.callback_metrics["health/alerts"] == 2
    assert not list(tmp_path.iterdir())


def test_validation_in_the_middle_of_an_epoch_gives_the_values_as_well(tmp_path: Path) -> None:
    seen = []

    class Look(pl.Callback):
        def on_validation_end(self, trainer: Any, module: Any) -> None:
            seen.append({name for name in trainer.callback_metrics if name.startswith("health/")})

    fit(Classifier(), quiet_trainer(tmp_path, [TrainingHealth(), Look()], val_check_interval=0.5))
    assert seen == [{"health/alerts", "health/entropy_min", "health/max_logit"}] * 2


def test_a_model_without_attention_is_told_once(tmp_path: Path) -> None:
    health = TrainingHealth(every_n_steps=1)
    trainer = quiet_trainer(tmp_path, [health])
    with pytest.warns(UserWarning, match="`TrainingHealth` is switched off") as told:
        fit(Classifier(BagOfWords()), trainer, pair_loader(), pair_loader(16))
    assert sum("switched off" in str(warning.message) for warning in told) == 1
    assert trainer.callback_metrics["health/alerts"] == 0


def test_attention_that_is_not_finite_is_told(tmp_path: Path) -> None:
    class Broken(Scale):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 3:
                self.net.layers[1].self_attn.in_proj_weight.data.fill_(torch.nan)

    health = watched(Broken(), tmp_path, batches=6)
    assert health.found[0][0] == 4
    assert {alert.kind for _, _, alert in health.found} == {"not_finite"}


def test_two_processes_agree_on_the_largest_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_another(share: Any, **_: Any) -> list[Any]:
        failed, own = share
        other = {name: vitals.clone() for name, vitals in own.items()}
        other[NAMES[1]][1, VITALS.index("max_logit")] = 500.0
        return [share, (failed, other)]

    monkeypatch.setattr(training_health, "from_all_processes", with_another)
    health = watched(Scale(), tmp_path, batches=2)
    assert [(layer, alert.kind, alert.heads) for _, layer, alert in health.found] == [(NAMES[1], "max_logit", (1,))]
    assert health._highest == 500.0


def test_a_process_that_failed_switches_all_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exchanges = []

    def with_another(share: Any, **_: Any) -> list[Any]:
        exchanges.append(share)
        return [share, (len(exchanges) == 2, {})]

    monkeypatch.setattr(training_health, "from_all_processes", with_another)
    health = TrainingHealth(every_n_steps=1)
    with pytest.warns(UserWarning, match="switched off .* A process could not look at its step"):
        quiet_trainer(tmp_path, [health]).fit(Scale(), sentences(6))
    assert len(exchanges) == 2


def test_a_failure_here_is_told_to_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exchanges = []

    def broken(*_: Any) -> None:
        raise MemoryError("full")

    monkeypatch.setattr(training_health, "from_all_processes", lambda share, **_: exchanges.append(share) or [share])
    monkeypatch.setattr(TrainingHealth, "_measure", broken)
    with pytest.warns(UserWarning, match="MemoryError: full"):
        quiet_trainer(tmp_path, [TrainingHealth(every_n_steps=1)]).fit(Scale(), sentences(4))
    assert exchanges == [(True, {})]


@pytest.mark.slow
def test_fine_tuning_a_pretrained_model_raises_no_alarm(tmp_path: Path) -> None:
    transformers, data = pytest.importorskip("transformers"), pytest.importorskip("examples.sentiment_data")
    try:
        path, sentences = data.minilm(), [each.text for each in data.sentence_splits().test[:64]]
    except (FileNotFoundError, PackageNotFoundError):
        pytest.skip("MiniLM or the sentences are not installed")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)

    class FineTuned(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = transformers.AutoModel.from_pretrained(path, local_files_only=True)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.model(**batch).pooler_output.square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), 2e-5)

    batches = DataLoader(sentences, 8, collate_fn=lambda texts: tokenizer(texts, return_tensors="pt", padding=True))
    health = TrainingHealth(every_n_steps=2)
    trainer = quiet_trainer(tmp_path, [health])
    trainer.fit(FineTuned(), batches)
    assert health.found == []
    assert len(health._record._first) == 6
    assert 0.2 < trainer.callback_metrics["health/entropy_min"] < 0.9
    assert 5 < trainer.callback_metrics["health/max_logit"] < 40


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    health = TrainingHealth()
    for run in range(2):
        assert (
            leftovers(fit(Classifier(), quiet_trainer(tmp_path / str(run), [health], logger=csv_logger(tmp_path))))
            == {}
        )

    class Failing(Scale):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            raise KeyboardInterrupt if batch_idx == 2 else ValueError("stop")

    module = Failing()
    with pytest.raises(ValueError, match="stop"):
        quiet_trainer(tmp_path, [health]).fit(module, sentences(4))
    assert leftovers(module) == {}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda callback: pickle.loads(pickle.dumps(callback))])
def test_copies_keep_the_arguments_only(copied: Callable[[Any], Any], tmp_path: Path) -> None:
    health = TrainingHealth(rows=4, thresholds=HealthThresholds(looks=5))
    quiet_trainer(tmp_path, [health]).fit(Scale(), sentences(2))
    twin = copied(health)
    assert repr(twin) == repr(health)
    assert twin.state_dict() == TrainingHealth().state_dict()
    assert twin.state_key == health.state_key != TrainingHealth(every_n_steps=3).state_key


def test_an_event_is_told_again_after_it_was_over() -> None:
    record = HealthRecord(HealthThresholds(looks=3, max_logit=10.0, least_growing_logit=1e9))
    calm, hot = (torch.tensor([[8.0, 0.8, 0.4, 0.3, score]]) for score in (5.0, 11.0))
    told = [len(record.add({"layer": look})) for look in (calm, hot, hot, calm, calm, hot, calm, calm, calm, hot)]
    assert told == [0, 1, 0, 0, 0, 0, 0, 0, 0, 1]
    assert record.events == 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rows": 0}, ValueError, "`rows` must be at least 1, got 0"),
        ({"every_n_steps": 0}, ValueError, "`every_n_steps` must be at least 1"),
        ({"layers": "encoder"}, TypeError, "`layers` must be a list of names"),
        (
            {"thresholds": 3},
            TypeError,
            r"`thresholds` must be a `HealthThresholds`, got 3. Write HealthThresholds\(...\)",
        ),
        ({"schema": {}}, TypeError, "`schema` must be a `BatchSchema`"),
    ],
)
def test_arguments_are_checked(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TrainingHealth(**options)
