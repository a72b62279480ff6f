"""What HeadRoles does where a look measured nothing, a process failed, or no logger listens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from attn_callbacks.callbacks import _roles_sums
from attn_callbacks.callbacks._guard import Guard
from attn_callbacks.callbacks._roles_sums import RoleSums
from attn_callbacks.callbacks.head_roles import HeadRoles
from attn_callbacks.functional.roles import head_roles
from tests.callbacks.models import Classifier, Texts, csv_logger, fit, loader, pl, quiet_trainer


def test_a_copy_that_fails_is_told_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that never came to the exchange would let all others wait for ever."""
    exchanged: list[Any] = []
    monkeypatch.setattr(_roles_sums, "from_all_processes", lambda share, **_: exchanged.append(share) or [share] * 2)

    def fails(_tensors: Any) -> Any:
        raise OSError("no memory")

    sums = RoleSums()
    sums.add("layer", head_roles(torch.rand(2, 2, 6, 6).softmax(-1)))
    monkeypatch.setattr(_roles_sums, "to_host", fails)
    with pytest.raises(RuntimeError, match=r"^A process could not measure all of its data\. OSError: no memory$"):
        sums.conclude(torch.device("cpu"), {}, failure=None)
    assert exchanged == [("OSError: no memory", {}, {})]


def test_the_cause_of_a_failure_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told: list[str | None] = []
    monkeypatch.setattr(RoleSums, "conclude", lambda sums, *_, failure: told.append(failure))

    def fails(_call: Any) -> None:
        raise OSError("no luck")

    roles = HeadRoles()
    monkeypatch.setattr(roles, "_measure", fails)
    with pytest.warns(UserWarning, match=r"switched off for the rest of this run\. OSError: no luck"):
        fit(Classifier(), quiet_trainer(tmp_path, [roles]), loader(8), loader(8))
    monkeypatch.delattr(roles, "_measure")
    fit(Classifier(), quiet_trainer(tmp_path, [roles]), loader(8), loader(8))
    assert told == ["OSError: no luck", None]  # a second run begins anew


class Values(pl.Callback):
    """Keeps what callbacks could monitor after each validation."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append({name: float(value) for name, value in trainer.callback_metrics.items() if "roles" in name})


class Shuffles(Texts):
    """Gives its samples in another order from the third look on."""

    looks = 0

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        self.looks += index == 0
        return super().__getitem__(index if self.looks < 3 else (index + 1) % 8)


def test_what_was_not_measured_is_not_monitored(tmp_path: Path) -> None:
    values = Values()
    trainer = quiet_trainer(tmp_path, [HeadRoles(clusters=False), values], max_epochs=3)
    with pytest.warns(UserWarning, match="knows no drift"):
        fit(Classifier(), trainer, loader(8), DataLoader(Shuffles(8), 8))
    assert [math.isnan(seen["roles/drift"]) for seen in values.seen] == [True, False, True]
    assert not any(math.isnan(seen["roles/short_range_mass"]) for seen in values.seen)


def test_nothing_is_monitored_after_an_error(tmp_path: Path) -> None:
    class Breaks(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                roles._sums.add = None

    roles, values = HeadRoles(clusters=False), Values()
    with pytest.warns(UserWarning, match="switched off for the rest"):
        fit(Classifier(), quiet_trainer(tmp_path, [roles, values, Breaks()], max_epochs=2), loader(8), loader(8))
    assert [math.isnan(seen["roles/long_range_mass"]) for seen in values.seen] == [False, True]
    assert math.isnan(values.seen[1]["roles/drift"])


def test_numbers_can_be_monitored_without_a_logger(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    roles = HeadRoles()
    stopping = pl.callbacks.EarlyStopping("roles/drift", mode="max", patience=9)
    trainer = quiet_trainer(tmp_path, [roles, stopping], max_epochs=3)
    fit(Classifier(), trainer, loader(8), loader(8))
    assert trainer.current_epoch == 3
    assert float(trainer.callback_metrics["roles/drift"]) == pytest.approx(float(roles.drift.mean()), rel=1e-5)
    assert roles._writer._pool is None
    assert not [warning for warning in recwarn if "HeadRoles" in str(warning.message)]


def test_nothing_is_drawn_without_a_logger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roles = HeadRoles()
    monkeypatch.setattr(roles._writer, "submit", lambda *_: pytest.fail("drawn for nobody"))
    fit(Classifier(), quiet_trainer(tmp_path, [roles]), loader(8), loader(8))
    assert roles.result is not None
    assert not roles._guard.off


def test_a_run_begins_with_nothing_of_another(tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    roles = HeadRoles()
    fit(Classifier(), quiet_trainer(tmp_path, [roles]), loader(8), loader(8))
    assert None not in (roles.result, roles.drift, roles.head_clusters)
    roles.probe = object()
    trainer = quiet_trainer(tmp_path, [roles], limit_val_batches=0, logger=csv_logger(tmp_path))
    fit(Classifier(), trainer, loader(8), loader(8))
    assert (roles.result, roles.drift, roles.head_clusters, roles.probe) == (None,) * 4


@pytest.mark.filterwarnings("ignore:Example is switched off")
def test_a_guard_keeps_the_first_cause_of_each_run() -> None:
    guard = Guard("Example")
    for first, second in (("one", "two"), ("three", "four")):
        guard.off = False
        assert guard.cause is None
        for text in (first, second):
            with guard.block():
                raise KeyError(text)
        assert guard.cause == f"KeyError: {first}"
