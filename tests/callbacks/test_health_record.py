"""What training health remembers: whole looks alone, few of them, and how long heads seem dead."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_callbacks.callbacks import training_health
from attn_callbacks.callbacks._health_record import HealthRecord
from attn_callbacks.callbacks.training_health import TrainingHealth
from attn_callbacks.functional.health import HealthThresholds, health_alerts
from attn_callbacks.functional.vitals import VITALS
from tests.callbacks.models import Classifier, fit, loader, quiet_trainer

NAN = math.nan


def look(entropy: Any = 0.8, confidence: Any = 0.4, rows: Any = 64.0, key_mass: Any = 0.3, top: Any = 4.0) -> Tensor:
    columns = (torch.as_tensor(value).float().expand(2) for value in (rows, entropy, confidence, key_mass, top))
    return torch.stack(list(columns), dim=-1)


CALM, UNIFORM = look(), look(entropy=(0.9999, 0.8))
BROKEN, UNMEASURED = (
    look(entropy=NAN, confidence=NAN),
    look((0.8, NAN), (0.4, NAN), (64.0, 0.0), (0.3, NAN), (4.0, NAN)),
)


def told(record: HealthRecord, looks: list[Tensor]) -> list[list[str]]:
    return [[alert.kind for _, alert in record.add({"layer": each})] for each in looks]


def test_memory_does_not_grow_with_the_looks_of_dead_heads() -> None:
    record = HealthRecord(HealthThresholds(dead_looks=10**9, looks=3))
    assert told(record, [UNIFORM] * 40) == [[]] * 40
    assert len(record.state_dict()["layers"]["layer"][1]) == 3


def test_dead_heads_are_counted_over_a_checkpoint_and_an_overflow() -> None:
    thresholds = HealthThresholds(dead_looks=30, looks=3)
    first, second = HealthRecord(thresholds), HealthRecord(thresholds)
    assert told(first, [UNIFORM] * 15)[-1] == []
    second.load_state_dict(first.state_dict())
    assert told(second, [BROKEN]) == [["not_finite"]]
    assert told(second, [UNIFORM] * 16) == [*[[]] * 14, ["dead"], []]
    assert told(second, [CALM] * 4 + [UNIFORM] * 30)[-2:] == [[], ["dead"]]


def test_dead_heads_are_told_and_stop_no_run() -> None:
    record = HealthRecord(HealthThresholds(dead_looks=4))
    assert told(record, [UNIFORM] * 4)[-1] == ["dead"]
    assert record.events == 0
    assert told(record, [BROKEN]) == [["not_finite"]]
    assert record.events == 1


def test_an_older_checkpoint_begins_to_count_anew() -> None:
    record = HealthRecord(HealthThresholds(dead_looks=4))
    told(record, [UNIFORM] * 3)
    state = {name: value for name, value in record.state_dict().items() if name != "runs"}
    record = HealthRecord(HealthThresholds(dead_looks=4))
    record.load_state_dict(state)
    assert told(record, [UNIFORM] * 4) == [[], [], [], ["dead"]]


def test_alarms_about_dead_heads_can_be_switched_off() -> None:
    off = HealthThresholds(dead_looks=None)
    assert told(HealthRecord(off), [UNIFORM] * 30) == [[]] * 30
    assert told(HealthRecord(HealthThresholds()), [UNIFORM] * 30).count(["dead"]) == 1
    assert health_alerts(UNIFORM, UNIFORM.expand(30, -1, -1), CALM, off) == ()


@pytest.mark.parametrize("bad", [BROKEN, UNMEASURED, look(top=math.inf)])
def test_the_first_look_is_the_first_that_is_whole(bad: Tensor) -> None:
    record = HealthRecord(HealthThresholds())
    assert ["saturated"] not in told(record, [bad, *[look(confidence=0.995)] * 3])
    assert told(record, [CALM, look(confidence=0.995)]) == [[], []]


@pytest.mark.parametrize("bad", [BROKEN, UNMEASURED])
def test_a_look_that_is_not_whole_hides_no_collapse(bad: Tensor) -> None:
    record = HealthRecord(HealthThresholds(drift=1.0))
    assert told(record, [CALM, CALM, bad, look(0.1)])[-1] == ["entropy_collapse"]
    alerts = health_alerts(look(0.1), torch.stack([CALM, bad]), CALM, HealthThresholds(drift=1.0))
    assert [alert.kind for alert in alerts] == ["entropy_collapse"]


@pytest.mark.parametrize(
    ("one", "other", "limits"),
    [
        (look((0.3, 0.8)), look((0.8, 0.3)), {"looks": 4}),
        (look((0.9999, 0.8)), look((0.8, 0.9999)), {"dead_looks": 1, "drift": 1.0}),
    ],
)
def test_dead_and_drifting_heads_are_events_of_their_own(one: Tensor, other: Tensor, limits: dict[str, Any]) -> None:
    record = HealthRecord(HealthThresholds(**limits))
    found = [record.add({"layer": each}) for each in [*[CALM] * 5, one, CALM, CALM, other]]
    assert [[alert.heads for _, alert in each] for each in (found[5], found[8])] == [[(0,)], [(1,)]]


def test_every_step_draws_rows_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Tensor] = []
    draw = training_health.drawn_rows

    def spied(*arguments: Any) -> Any:
        rows, real = draw(*arguments)
        drawn.append(rows)
        return rows, real

    monkeypatch.setattr(training_health, "drawn_rows", spied)
    for folder in ("one", "two"):
        fit(Classifier(), quiet_trainer(tmp_path / folder, [TrainingHealth(rows=2, every_n_steps=1)]), unpadded())
    half = len(drawn) // 2
    assert all(torch.equal(*pair) for pair in zip(drawn[:half], drawn[half:], strict=True))
    assert len({tuple(rows.flatten().tolist()) for rows in drawn[:half:2]}) > 1


def unpadded() -> Any:
    data = loader(32)
    data.dataset.attention_mask[:] = 1
    return data


def test_an_infinite_score_is_handed_to_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exploded(share: Any, **_: Any) -> list[Any]:
        for vitals in share[1].values():
            vitals[0, VITALS.index("max_logit")] = math.inf
        return [share]

    monkeypatch.setattr(training_health, "from_all_processes", exploded)
    trainer = quiet_trainer(tmp_path, [TrainingHealth(every_n_steps=1)])
    with pytest.warns(UserWarning, match="not finite"):
        fit(Classifier(), trainer)
    assert math.isnan(trainer.callback_metrics["health/max_logit"])
