"""Two processes do together what one does with all samples: the same loss, the same gradient, the same state."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from losses._distributed import process_count, sum_over_processes
from tests.losses.distributed_script import SCENARIOS, Result

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 120

pytestmark = pytest.mark.ddp


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
