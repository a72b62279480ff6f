"""Compare run times fairly on a noisy machine: arms take turns in one process, and only ratios are reported."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

__all__ = ["Comparison", "compare", "report"]


class Comparison(NamedTuple):
    """Time of an arm relative to the first arm.

    Args:
        seconds: Median seconds of one call.
        ratio: Median of the paired ratios to the first arm.
        low: Lower end of the bootstrap 95 % interval of ``ratio``.
        high: Upper end.
    """

    seconds: float
    ratio: float
    low: float
    high: float


def compare(arms: Mapping[str, Callable[[], Any]], pairs: int = 21, warm_up: int = 3) -> dict[str, Comparison]:
    """Time every arm ``pairs`` times, in turns, and relate each to the first arm of its turn."""
    for _ in range(warm_up):
        for run in arms.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(pairs):
        order = list(arms) if turn % 2 == 0 else list(reversed(arms))  # ABBA: a drift hits both sides alike
        for name in order:
            started = time.perf_counter()
            arms[name]()
            times[name].append(time.perf_counter() - started)
    base = np.array(next(iter(times.values())))
    return {name: _relate(np.array(seconds), base) for name, seconds in times.items()}


def report(
    title: str, results: Mapping[str, Comparison], folder: Path, memory: Mapping[str, int] | None = None
) -> None:
    """Print a table and write ``<folder>/<title>.json``; ``memory`` is the peak of each arm in bytes."""
    memory = memory or {}
    width = max(34, *map(len, results))
    print(f"\n{title}   ({torch.get_num_threads()} thread(s), torch {torch.__version__})")
    print(f"{'':{width}s} {'ms':>9s} {'ratio':>7s}   95 % interval" + ("       MB" if memory else ""))
    for name, result in results.items():
        line = (
            f"{name:{width}s} {1000 * result.seconds:9.2f} {result.ratio:7.3f}   [{result.low:.3f}, {result.high:.3f}]"
        )
        print(line + (f"  {memory[name] / 1e6:9.1f}" if name in memory else ""))
    arms = {name: {**result._asdict(), "peak_bytes": memory.get(name)} for name, result in results.items()}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{title.replace(' ', '_')}.json"
    path.write_text(json.dumps({"threads": torch.get_num_threads(), "torch": torch.__version__, "arms": arms}))


def _relate(seconds: np.ndarray[Any, Any], base: np.ndarray[Any, Any]) -> Comparison:
    ratios = seconds / base
    draws = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return Comparison(statistics.median(seconds.tolist()), float(np.median(ratios)), float(low), float(high))
