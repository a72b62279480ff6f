"""Compare run times fairly on a noisy machine: arms take turns in one process, and only ratios are reported."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Comparison", "Interval", "Turns", "median_interval", "take_turns"]

Array = np.ndarray[Any, Any]
Clock = Callable[[], float]


class Interval(NamedTuple):
    """A number and its 95 % interval; a number that does not vary has both ends at itself.

    Args:
        value: The number.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float

    @classmethod
    def exact(cls, value: float) -> Interval:
        """Return a number that is counted and not sampled."""
        return cls(value, value, value)


class Comparison(NamedTuple):
    """Time of an arm relative to another arm, mostly the first one.

    Args:
        seconds: Median seconds of one call.
        ratio: Median of the paired ratios to the other arm.
        low: Lower end of the bootstrap 95 % interval of ``ratio``.
        high: Upper end.
        least_ratio: Shortest time of the arm over the shortest of the other arm.
        process_seconds: Median seconds of processor time, of all threads together.
        process_ratio: Median of the paired ratios of processor time.
        process_low: Lower end of the interval of ``process_ratio``.
        process_high: Upper end.
    """

    seconds: float
    ratio: float
    low: float
    high: float
    least_ratio: float
    process_seconds: float
    process_ratio: float
    process_low: float
    process_high: float


@dataclass(frozen=True)
class Turns:
    """Seconds of every arm, turn by turn.

    Args:
        wall: Seconds by the clock on the wall, ``(turns,)`` for each arm.
        process: Seconds of processor time of all threads, likewise.
    """

    wall: Mapping[str, Array]
    process: Mapping[str, Array]

    def ratio(self, arm: str, over: str) -> Interval:
        """Return the median of the paired ratios of two arms."""
        return median_interval(self.wall[arm] / self.wall[over])

    def compared(self, arm: str, over: str) -> Comparison:
        """Return everything about one arm, relative to another."""
        wall, process = self.wall[arm], self.process[arm]
        ratio, busy = self.ratio(arm, over), median_interval(process / np.maximum(self.process[over], 1e-9))
        least = float(wall.min() / self.wall[over].min())
        return Comparison(float(np.median(wall)), *ratio, least, float(np.median(process)), *busy)

    def table(self) -> dict[str, Comparison]:
        """Return all arms, each relative to the first."""
        return {arm: self.compared(arm, next(iter(self.wall))) for arm in self.wall}


def median_interval(values: Array) -> Interval:
    """Return the median of independent values, with its bootstrap 95 % interval."""
    draws = np.random.default_rng(0).choice(values, (2000, len(values)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return Interval(float(np.median(values)), float(low), float(high))


def take_turns(
    arms: Mapping[str, Callable[[], Any]],
    pairs: int = 21,
    warm_up: int = 3,
    clocks: tuple[Clock, Clock] = (time.perf_counter, time.process_time),
    wait: Callable[[], Any] | None = None,
) -> Turns:
    """Time every arm ``pairs`` times, in turns.

    Args:
        arms: What to run, by name.
        pairs: Number of turns.
        warm_up: Turns before those that count.
        clocks: Read wall time and processor time.
        wait: Called before a clock is read, to let a device finish.
    """
    for _ in range(warm_up):
        for run in arms.values():
            run()
    times: dict[str, list[tuple[float, ...]]] = {name: [] for name in arms}
    for turn in range(pairs):
        order = list(arms) if turn % 2 == 0 else list(arms)[::-1]  # ABBA: a drift hits both sides alike
        for name in order:
            times[name].append(_timed(arms[name], clocks, wait or (lambda: None)))
    wall, process = ({name: np.array([row[i] for row in rows]) for name, rows in times.items()} for i in (0, 1))
    return Turns(wall, process)


def _timed(run: Callable[[], Any], clocks: tuple[Clock, Clock], wait: Callable[[], Any]) -> tuple[float, float]:
    wall, process = clocks
    wait()
    started, busy = wall(), process()
    run()
    wait()
    return wall() - started, process() - busy
