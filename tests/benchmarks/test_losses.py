from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import losses
from benchmarks import loss_arms
from benchmarks.allocation import peak_bytes

ROOT = Path(__file__).parents[2]


def test_memory_is_that_of_the_tensors_alive_at_once():
    start = torch.zeros(1000)

    def run() -> None:
        first = start + 1
        second = first.view(10, 100) * 2  # a view is no memory
        del first
        second.add_(1)  # neither is a change in place
        torch.zeros(500)

    assert peak_bytes(run) == 4 * 2000
    assert peak_bytes(lambda: start.view(10, 100)) == 0


def test_every_public_module_is_measured():
    """By its own name, or by its function, as the arms are written."""
    source = Path(loss_arms.__file__).read_text(encoding="utf-8")
    public = [name for name in losses.__all__ if isinstance(getattr(losses, name), type)]
    modules = [name for name in public if issubclass(getattr(losses, name), nn.Module)]
    assert [name for name in modules if name not in source] == []


@pytest.mark.slow
def test_the_benchmark_runs_as_a_file(tmp_path):
    command = [sys.executable, "benchmarks/losses.py", "--quick", "--out", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "DeepEnsemble" in result.stdout
    arms = json.loads((tmp_path / "losses.json").read_text())["blocks"][0]["arms"]
    assert arms["DeepEnsemble"]["tensors, MB"] > 0
    assert 0.2 < arms["DeepEnsemble"]["ratio"] < 5
