"""Sums by the name of the layer, over processes that saw layers in another order, or none."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_callbacks.callbacks import _gate_sums
from attn_callbacks.callbacks._gate_sums import GateSums
from attn_callbacks.metrics.importance import HeadImportanceMetric, HeadImportanceResult

CPU = torch.device("cpu")
Found = tuple[tuple[str, ...], HeadImportanceResult] | str | None


def filled(*batches: tuple[str, Tensor]) -> GateSums:
    sums = GateSums()
    for layer, gates in batches:
        sums.see(layer, gates.shape[1], CPU)
        sums.add(layer, gates)
    return sums


def over_processes(monkeypatch: pytest.MonkeyPatch, *processes: tuple[GateSums, bool, bool]) -> list[Found]:
    """What each process concludes; all of them give their shares before any of them goes on."""
    shares: list[Any] = []
    found: list[Found] = []
    for sums, looked, failed in processes:
        monkeypatch.setattr(_gate_sums, "from_all_processes", lambda share, **_: shares.append(share) or [share])
        with suppress(RuntimeError):
            sums.conclude(CPU, looked=looked, failed=failed)
    monkeypatch.setattr(_gate_sums, "from_all_processes", lambda *_, **__: shares)
    for _ in processes:
        try:
            found.append(GateSums().conclude(CPU, looked=False, failed=False))
        except RuntimeError as error:
            found.append(str(error))
    return found


def test_processes_agree_on_layers_and_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = torch.randn(3, 2), torch.randn(4, 3), torch.randn(5, 2)
    one = filled(("a", first), ("b", second))
    two = filled(("c", third), ("a", third))
    empty = GateSums()
    found = over_processes(monkeypatch, (one, True, False), (two, True, False), (empty, False, False))
    expected = HeadImportanceMetric(3, 3)
    for layer, gates in ((0, first), (0, third), (1, second), (2, third)):
        expected.update(layer, gates)
    for conclusion in found:
        assert isinstance(conclusion, tuple)
        layers, result = conclusion
        assert layers == ("a", "b", "c")
        torch.testing.assert_close(tuple(result), tuple(expected.compute()), rtol=1e-12, atol=0, equal_nan=True)


def test_one_that_failed_speaks_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = filled(("a", torch.ones(2, 2))), filled(("a", torch.ones(2, 2)))
    assert (
        over_processes(monkeypatch, (good, True, False), (bad, True, True))
        == ["A process could not take in all of its gradients."] * 2
    )


def test_nothing_where_nobody_looked() -> None:
    assert GateSums().conclude(CPU, looked=True, failed=False) is None
    assert filled(("a", torch.ones(2, 2))).conclude(CPU, looked=False, failed=False) is None


def test_a_conclusion_starts_anew_and_keeps_the_layers() -> None:
    sums = filled(("a", torch.ones(2, 2)), ("b", torch.ones(2, 2)))
    sums.conclude(CPU, looked=True, failed=False)
    sums.add("b", torch.full((1, 2), 3.0))
    found = sums.conclude(CPU, looked=True, failed=False)
    assert found is not None
    assert found[0] == ("a", "b")
    assert found[1].samples.tolist() == [[0, 0], [1, 1]]
    assert found[1].mean[1].tolist() == [3.0, 3.0]
