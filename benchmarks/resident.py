"""Peak memory of a call as the operating system sees it, in this process or in a fresh one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Memory", "fresh_memory", "resident_growth"]

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Memory(NamedTuple):
    """What a call needed beyond what was there before.

    Args:
        resident: Growth of the resident memory at its peak, in bytes.
        tensors: Bytes of the tensors alive at once, counted.
    """

    resident: int
    tensors: int


def fresh_memory(arm: str, tokens: int, threads: int = 1) -> Memory:
    """Measure an arm of ``benchmarks.memory_arm`` in a process of its own, where nothing was freed before."""
    command = [sys.executable, "-m", "benchmarks.memory_arm", arm, str(tokens), str(threads)]
    root = Path(__file__).resolve().parents[1]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)  # noqa: S603
    if result.returncode != 0:
        raise RuntimeError(f"`{arm}` at {tokens} tokens failed in its own process: {result.stderr.strip()[-500:]}")
    return Memory(**json.loads(result.stdout.splitlines()[-1]))


def resident_growth(run: Callable[[], Any]) -> int:
    """Return by how many bytes the resident memory of this process grew at its peak during ``run()``.

    Linux can set the peak back before; elsewhere a peak before the call hides what is below it.
    """
    if _RESET.exists():
        _RESET.write_text("5")  # sets the peak to what is resident now
        before = _status("VmRSS")
        run()
        return max(0, _status("VmHWM") - before)
    before = _highest()
    run()
    return _highest() - before


def _status(name: str) -> int:
    line = next(line for line in _STATUS.read_text(encoding="utf-8").splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def _highest() -> int:
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
