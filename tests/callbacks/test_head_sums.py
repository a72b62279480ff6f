"""What a conclusion of HeadStatistics costs on one process; `test_distributed.py` has the others."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from attn_callbacks import (
    AlignmentMonitor,
    AttentionCall,
    ErrorAnalysis,
    HeadRoles,
    HeadStatistics,
    TrainingHealth,
)
from attn_callbacks.callbacks import _head_sums, _processes
from attn_callbacks.callbacks._head_sums import HeadSums
from tests.callbacks.models import Classifier, csv_logger, fit, quiet_trainer


def test_a_validation_copies_once_to_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[str] = []
    inside: list[bool] = []
    conclude = HeadSums.conclude

    def spied(name: str) -> Any:
        function = getattr(torch.Tensor, name)

        def call(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
            if inside:
                copies.append(name)
            return function(tensor, *args, **options)

        return call

    def watched(sums: HeadSums, *args: Any, **options: Any) -> Any:
        inside.append(True)
        try:
            return conclude(sums, *args, **options)
        finally:
            inside.clear()

    for name in ("cpu", "item", "tolist", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, spied(name))
    monkeypatch.setattr(HeadSums, "conclude", watched)
    trainer = quiet_trainer(tmp_path, [HeadStatistics()], logger=csv_logger(tmp_path), max_epochs=3)
    fit(Classifier(), trainer)
    assert copies == ["cpu"] * 3


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mode", ["sampled", "exact"])
def test_a_step_waits_for_no_device(mode: str, is_causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device has no values: whoever looked at one would fail."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # knows no meta device
    statistics = HeadStatistics(rows=8, mode=mode)
    statistics._generator, statistics._samples = torch.Generator(), 2
    statistics._valid = torch.ones(2, 40, dtype=torch.bool, device="meta")
    tokens, mask = torch.ones(2, 4, 40, 16, device="meta"), torch.ones(2, 1, 1, 40, dtype=torch.bool, device="meta")
    for name in ("first", "second", "first"):
        call = AttentionCall(name, query=tokens, key=tokens, mask=mask, is_causal=is_causal)
        statistics._measure(call)
    assert list(statistics._sums._layers) == ["first", "second"]
    assert statistics._sums._metric.moments.is_meta


def test_a_failure_on_the_way_leaves_no_half_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(sums: HeadSums, *args: Any) -> None:
        if sums._layers:
            raise MemoryError("full")
        add(sums, *args)

    add = HeadSums.add
    monkeypatch.setattr(HeadSums, "add", fail)
    statistics = HeadStatistics()
    trainer = quiet_trainer(tmp_path, [statistics], logger=csv_logger(tmp_path))
    with pytest.warns(UserWarning, match="`HeadStatistics` is switched off.*MemoryError: full"):
        fit(Classifier(), trainer)
    assert statistics.result is None
    known = [value for name, value in trainer.callback_metrics.items() if name.startswith("heads/")]
    assert torch.stack(known).isnan().all()


class Foreign:
    """A process group of two that nobody else answers in."""

    @staticmethod
    def fail(*_: Any, **__: Any) -> None:
        pytest.fail("waits for processes that are not of this run")

    all_reduce = all_gather_object = fail
    is_available = is_initialized = staticmethod(lambda: True)
    get_world_size, get_rank = staticmethod(lambda: 2), staticmethod(lambda: 0)


def test_a_run_on_one_device_stays_out_of_a_process_group_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (_head_sums, _processes):
        monkeypatch.setattr(module, "dist", Foreign)
    statistics, health = HeadStatistics(importance_every_n_steps=1), TrainingHealth(every_n_steps=1)
    others = [HeadRoles(), ErrorAnalysis(), AlignmentMonitor(cross_only=False), health]
    fit(Classifier(), quiet_trainer(tmp_path, [statistics, *others], logger=csv_logger(tmp_path)))
    assert all(callback.result is not None for callback in [statistics, *others[:3]])
    assert math.isfinite(health._lowest)
    assert statistics.importance is not None
    with pytest.raises(pytest.fail.Exception, match="waits for processes"):
        HeadSums(2).conclude(torch.device("cpu"), failed=False)
