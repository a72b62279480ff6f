"""Alarms about attention: each at its limit, none below it, and none where training goes well."""

from __future__ import annotations

import pytest
import torch

from attn_callbacks.functional.health import HealthThresholds, health_alerts


def look(
    entropy: object = 0.8, confidence: object = 0.4, key_mass: object = 0.3, max_logit: object = 4.0
) -> torch.Tensor:
    """Vitals of two heads."""
    columns = [
        torch.as_tensor(value, dtype=torch.float32).expand(2)
        for value in (64.0, entropy, confidence, key_mass, max_logit)
    ]
    return torch.stack(columns, dim=-1)


CALM = look()


def kinds(now: torch.Tensor, recent: list[torch.Tensor], first: torch.Tensor = CALM, **limits: object) -> list[str]:
    before = torch.stack(recent) if recent else now[None][:0]
    return [alert.kind for alert in health_alerts(now, before, first, HealthThresholds(**limits))]


def test_a_calm_layer_raises_no_alarm() -> None:
    assert kinds(CALM, []) == []
    assert kinds(CALM, [CALM] * 30) == []


@pytest.mark.parametrize(
    ("entropy", "before", "expected"),
    [
        (0.19, 0.6, ["entropy_collapse"]),
        (0.21, 0.6, []),  # not low
        (0.19, 0.36, []),  # low already: sharp heads are none that collapse
        ((0.01, 0.35), 0.6, ["entropy_collapse"]),  # the mean of the heads counts
        ((0.01, 0.45), 0.6, []),
    ],
)
def test_collapse_is_low_and_fast(entropy: object, before: float, expected: list[str]) -> None:
    assert kinds(look(entropy), [look(before)] * 3, drift=1.0) == expected


def test_collapse_reaches_back_as_far_as_was_said() -> None:
    slow = [look(0.9 - 0.035 * step) for step in range(20)]
    assert kinds(look(0.19), slow, looks=5, drift=1.0) == []
    assert kinds(look(0.19), slow, looks=15, drift=1.0) == ["entropy_collapse"]
    (alert,) = health_alerts(look(0.1), look(0.6)[None], CALM)
    assert alert.text == "the mean normalised entropy of its heads fell from 0.60 to 0.10 (limit 0.2)"
    assert (alert.value, alert.limit, alert.heads) == (pytest.approx(0.1), 0.2, ())


def test_large_scores_name_their_heads() -> None:
    (alert,) = health_alerts(look(max_logit=(90.0, 101.0)), look(max_logit=80.0)[None], CALM)
    assert (alert.kind, alert.heads, alert.value, alert.limit) == ("max_logit", (1,), 101.0, 100.0)
    assert kinds(look(max_logit=100.0), [look(max_logit=99.0)]) == []


@pytest.mark.parametrize(
    ("now", "before", "expected"),
    [(21.0, 10.0, ["logit_growth"]), (19.0, 2.0, []), (39.0, 20.0, []), (41.0, 20.0, ["logit_growth"])],
)
def test_growth_is_told_above_what_learning_does(now: float, before: float, expected: list[str]) -> None:
    assert kinds(look(max_logit=now), [look(max_logit=before)] * 2) == expected


def test_a_first_look_has_grown_from_nothing() -> None:
    assert kinds(look(max_logit=60.0), [], look(max_logit=60.0)) == []


def test_saturated_heads_became_so_and_are_many() -> None:
    sharp = look(confidence=0.995)
    assert kinds(sharp, [CALM]) == ["saturated"]
    assert kinds(sharp, [CALM], sharp) == []
    assert kinds(look(confidence=(0.995, 0.5)), [CALM]) == []
    assert kinds(look(confidence=(0.995, 0.5)), [CALM], saturated_share=0.4) == ["saturated"]


def test_a_head_that_averages_all_tokens_is_dead_if_another_is_not() -> None:
    uniform, all_uniform = look(entropy=(0.9999, 0.8)), look(entropy=0.9999)
    assert kinds(uniform, [uniform] * 19) == ["dead"]
    assert kinds(uniform, [uniform] * 18) == []
    assert kinds(uniform, [uniform] * 10 + [CALM] + [uniform] * 10) == []
    assert kinds(all_uniform, [all_uniform] * 30) == []  # nothing learned yet
    (alert,) = health_alerts(uniform, torch.stack([uniform] * 19), CALM)
    assert alert.heads == (0,)


def test_a_head_that_takes_one_key_whatever_the_query_is_dead_if_it_was_not() -> None:
    stuck = look(key_mass=(0.3, 0.995))
    assert kinds(stuck, [stuck] * 3, dead_looks=4) == ["dead"]
    assert kinds(stuck, [stuck] * 3, stuck, dead_looks=4) == []


def test_drift_is_far_and_sudden() -> None:
    steady = [look(0.80 + 0.01 * (step % 2)) for step in range(8)]
    (alert,) = health_alerts(look((0.8, 0.45)), torch.stack(steady), CALM)
    assert (alert.kind, alert.heads) == ("drift", (1,))
    assert kinds(look((0.8, 0.55)), steady) == []  # not far
    assert kinds(look((0.8, 0.45)), steady[:4]) == []  # too little is known of it
    restless = [look(0.5 + 0.2 * (step % 2)) for step in range(8)]
    assert kinds(look(0.3), restless) == []  # it always moves like that


@pytest.mark.parametrize(
    "bad", [look(entropy=(0.5, torch.nan)), look(max_logit=(1.0, torch.inf)), look(max_logit=(1.0, torch.nan))]
)
def test_what_is_not_finite_is_told_alone(bad: torch.Tensor) -> None:
    (alert,) = health_alerts(bad, torch.stack([CALM] * 3), CALM)
    assert (alert.kind, alert.heads) == ("not_finite", (1,))


def test_a_head_without_rows_does_not_hide_what_is_not_finite() -> None:
    now = look(entropy=(torch.nan, torch.nan), max_logit=(torch.inf, -torch.inf))
    now[1, 0] = 0.0
    (alert,) = health_alerts(now, torch.stack([CALM] * 3), CALM)
    assert (alert.kind, alert.heads) == ("not_finite", (0,))


def test_drift_tells_how_far_its_own_heads_moved() -> None:
    """The other head always moves by 0.8."""
    recent = torch.stack([look((0.1 + 0.8 * (step % 2), 0.5)) for step in range(8)])
    (alert,) = health_alerts(look((0.1, 0.95)), recent, CALM)
    assert (alert.heads, alert.value) == ((1,), pytest.approx(0.45))
    assert alert.text == "the normalised entropy of heads 1 moved by up to 0.45 in one look"


def test_weights_without_scores_and_looks_without_rows_raise_no_alarm() -> None:
    assert kinds(look(max_logit=-torch.inf), [look(max_logit=-torch.inf)] * 5) == []
    assert kinds(torch.full((2, 5), torch.nan), [CALM]) == []
    empty = torch.tensor([[0.0, *[torch.nan] * 4]] * 2)
    assert kinds(empty, [CALM]) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"entropy": 1.5}, "`entropy` must lie between 0.0 and 1.0, got 1.5"),
        ({"max_logit": -1.0}, "`max_logit` must lie between"),
        ({"looks": 1}, "`looks` must be at least 2"),
        ({"dead_looks": 0}, "`dead_looks` must be at least 1"),
        ({"drift": float("nan")}, "`drift` must lie between"),
    ],
)
def test_thresholds_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HealthThresholds(**options)
