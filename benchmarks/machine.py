"""What the numbers were measured on, and which kernel did the work."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["facts", "kernel_of"]


def facts(device: str = "cpu") -> dict[str, Any]:
    """Return what a reader has to know of the machine."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def kernel_of(run: Callable[[], Any], device: str = "cpu") -> str:
    """Return the name of the operator, or on a GPU of the kernel, in which ``run()`` spends most of its time."""
    activity = ProfilerActivity.CUDA if device.startswith("cuda") else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        run()
    spent = "self_device_time_total" if device.startswith("cuda") else "self_cpu_time_total"
    return str(max(profiler.key_averages(), key=lambda event: getattr(event, spent)).key)


def _processor() -> str:
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text(encoding="utf-8").splitlines() if cpus.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
