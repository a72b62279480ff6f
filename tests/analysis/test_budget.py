"""Progress and time."""

from __future__ import annotations

import pytest

from attn_callbacks.analysis._budget import Budget


def test_without_anything() -> None:
    budget = Budget(None, False)
    budget.plan(2)
    assert (budget.is_untouched, budget.is_spent, budget.was_enough) == (True, False, False)
    budget.step(2)
    assert (budget.is_untouched, budget.is_spent, budget.was_enough) == (False, False, True)


def test_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    monkeypatch.setattr("attn_callbacks.analysis._budget.time.monotonic", lambda: now[0])
    budget = Budget(5.0, False)
    now[0] = 14.9
    assert not budget.is_spent
    now[0] = 15.0
    assert budget.is_spent


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan")])
def test_no_time(seconds: float) -> None:
    with pytest.raises(ValueError, match="`seconds` must be above 0"):
        Budget(seconds, False)


def test_a_bar_ends_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    budget = Budget(None, True)
    budget.plan(2)
    budget.step()
    assert capsys.readouterr().err.endswith(f"[{'#' * 20}{'.' * 20}]  50%")
    budget.step()
    assert capsys.readouterr().err.endswith("100%\n")


def test_fewer_steps_than_planned() -> None:
    shares: list[float] = []
    budget = Budget(None, shares.append)
    budget.plan(10)
    budget.step(2)
    budget.expect(8)  # as planned
    budget.expect(2)
    budget.step(2)
    assert shares == [0.0, 0.2, 0.5, 1.0]
    assert budget.was_enough
