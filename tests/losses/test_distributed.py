"""Two processes do together what one does with all samples: the same loss, the same gradient, the same state."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from losses._distributed import process_count, sum_over_processes
from losses.balancing import DynamicWeightAverage, GradientSurgery, GradNorm, RandomLossWeighting
from losses.classification import SeesawLoss
from losses.groups import GroupDROLoss, WorstGroupLoss
from tests.losses.distributed_script import SCENARIOS, Result

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 120
GROUP: Any = object()


def start(folder: Path, rank: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.losses.distributed_script", str(folder), str(rank), "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    with (folder / f"rank{rank}.txt").open("w") as output:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Result]]:
    """What each of two processes saw."""
    folder = tmp_path_factory.mktemp("two")
    processes = [start(folder, rank) for rank in range(2)]
    deadline = time.monotonic() + SECONDS
    try:
        for process in processes:
            process.wait(timeout=max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        pytest.fail("The processes wait for one another.")
    finally:
        for process in processes:
            process.kill()
    told = "\n".join((folder / f"rank{rank}.txt").read_text() for rank in range(2))
    assert [process.returncode for process in processes] == [0, 0], told
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.ddp
@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_are_one(name: str, two: list[dict[str, Result]]) -> None:
    torch.manual_seed(0)
    expected, first, second = SCENARIOS[name](0, 1), two[0][name], two[1][name]
    assert set(first) == set(second) == set(expected)
    for part, value in expected.items():
        if part == "loss":
            torch.testing.assert_close((first[part] + second[part]) / 2, value, rtol=1e-9, atol=1e-12)
        else:
            assert torch.equal(first[part], second[part]), part
            torch.testing.assert_close(first[part], value, rtol=1e-9, atol=1e-12)


def test_one_process_adds_up_nothing() -> None:
    values = torch.rand(3, requires_grad=True)
    total = sum_over_processes(values)
    assert process_count() == 1
    assert torch.equal(total, values)
    assert total.data_ptr() != values.data_ptr()
    assert not total.requires_grad


class Three:
    """Stands in for ``torch.distributed``: three processes with the same values, which remembers who was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def is_available(self) -> bool:
        return True

    is_initialized = is_available

    def get_world_size(self, group: Any = None) -> int:
        self.asked.append(group)
        return 3

    def all_reduce(self, tensor: torch.Tensor, group: Any = None) -> None:
        self.asked.append(group)
        tensor.mul_(3)


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> Three:
    stand_in = Three()
    monkeypatch.setattr("losses._distributed.distributed", stand_in)
    return stand_in


@pytest.mark.parametrize("group", [GROUP, None])
def test_the_process_group_is_the_one_that_adds_up(three: Three, group: Any) -> None:
    values = torch.tensor([1.0, 2.0], requires_grad=True)
    total = sum_over_processes(values, group)
    assert total.tolist() == [3.0, 6.0]
    assert values.tolist() == [1.0, 2.0]
    assert not total.requires_grad
    assert process_count(group) == 3
    assert three.asked == [group] * 3


def test_a_process_outside_the_group_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    outside = SimpleNamespace(is_available=lambda: True, is_initialized=lambda: True, get_world_size=lambda group: -1)
    monkeypatch.setattr("losses._distributed.distributed", outside)
    assert process_count(GROUP) == 1
    assert sum_over_processes(torch.ones(2), GROUP).tolist() == [1.0, 1.0]


def on_groups(criterion: nn.Module) -> None:
    criterion(torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.tensor([0, 1]), group=torch.tensor([0, 1]))


def on_classes(criterion: nn.Module) -> None:
    criterion(torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.tensor([0, 1]))


def on_tasks(weighting: nn.Module) -> None:
    weighting(torch.tensor([1.0, 4.0]))


def on_a_shared_weight(balancing: Any) -> None:
    weight = torch.ones(2, requires_grad=True)
    losses = [weight @ torch.tensor([1.0, 0.0]), weight @ torch.tensor([1.0, 3.0])]
    (balancing.backward if isinstance(balancing, GradientSurgery) else balancing)(losses, [weight])


COMMUNICATING: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
    "GroupDROLoss": (lambda: GroupDROLoss(2, 0.5, process_group=GROUP), on_groups),
    "WorstGroupLoss": (lambda: WorstGroupLoss(2, process_group=GROUP), on_groups),
    "SeesawLoss": (lambda: SeesawLoss(2, process_group=GROUP), on_classes),
    "DynamicWeightAverage": (lambda: DynamicWeightAverage(2, process_group=GROUP), on_tasks),
    "GradNorm": (lambda: GradNorm(2, process_group=GROUP), on_a_shared_weight),
    "GradientSurgery": (lambda: GradientSurgery("pcgrad", process_group=GROUP), on_a_shared_weight),
}
LEARNING = {name: pair for name, pair in COMMUNICATING.items() if name != "GradientSurgery"}
LEARNING["RandomLossWeighting"] = (lambda: RandomLossWeighting(2), on_tasks)


@pytest.mark.parametrize("name", COMMUNICATING)
def test_a_loss_asks_its_own_process_group(three: Three, name: str) -> None:
    build, call = COMMUNICATING[name]
    call(build())
    assert three.asked
    assert all(group is GROUP for group in three.asked)


@pytest.mark.parametrize("quiet", ["eval", "no_grad", "inference_mode"])
@pytest.mark.parametrize("name", LEARNING)
def test_a_loss_learns_and_asks_in_training_with_gradients_only(three: Three, name: str, quiet: str) -> None:
    build, call = LEARNING[name]
    criterion = build()
    call(criterion)
    before = copy.deepcopy(criterion.state_dict())
    three.asked.clear()
    with {"eval": nullcontext, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}[quiet]():
        call(criterion.train(quiet != "eval"))
    assert three.asked == []
    assert all(torch.equal(value, before[part]) for part, value in criterion.state_dict().items())
    call(criterion.train())
    changed = [part for part, value in criterion.state_dict().items() if not torch.equal(value, before[part])]
    assert changed or name == "WorstGroupLoss"
