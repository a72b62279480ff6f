"""Run a script of these tests on two processes that Lightning connects."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run_on_two(module: str, folder: Path, seconds: float = 180) -> None:
    """Run ``python -m module folder 2`` to its end, and fail if it fails or does not end in time."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, str(folder), "2"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the process that Lightning started too
        pytest.fail("The processes wait for one another.")
    assert process.returncode == 0, output
