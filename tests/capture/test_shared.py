from __future__ import annotations

import math

import pytest

from attn_callbacks.capture.shared import Shared, replaced


def test_the_first_changes_and_the_last_restores_in_any_order() -> None:
    original = math.cos
    shared = Shared(lambda: replaced(math, "cos", lambda cos: lambda x: -cos(x)))
    first, second = shared.held(), shared.held()
    first.__enter__()
    changed = math.cos
    second.__enter__()
    assert math.cos is changed
    assert math.cos(0) == -1
    first.__exit__(None, None, None)
    assert math.cos is changed
    second.__exit__(None, None, None)
    assert math.cos is original
    with shared.held():
        assert math.cos(0) == -1
    assert math.cos is original


def test_an_exception_restores() -> None:
    original = math.cos
    with pytest.raises(KeyboardInterrupt), Shared(lambda: replaced(math, "cos", lambda cos: abs)).held():
        raise KeyboardInterrupt
    assert math.cos is original


def test_a_context_that_fails_to_start_holds_nothing() -> None:
    attempts = []

    def make() -> object:
        attempts.append(1)
        raise OSError("broken")

    shared = Shared(make)
    for _ in range(2):
        with pytest.raises(OSError, match="broken"), shared.held():
            pass
    assert len(attempts) == 2
