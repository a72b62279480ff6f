"""What a benchmark is made of: settings in, blocks of numbers out, goals they are held against."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar

import torch

from benchmarks.paired import Interval, Turns, take_turns

__all__ = ["Block", "Goal", "Setting", "Table", "Verdict"]

Verdict = Literal["met", "undecided", "missed"]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Setting:
    """How to run.

    Args:
        device: Where the tensors live.
        quick: Few pairs of tiny problems: shows that the benchmark runs, and measures nothing.
        long: Also what takes many minutes.
        pairs: Turns of each comparison.
    """

    device: str = "cpu"
    quick: bool = False
    long: bool = False
    pairs: int = 15

    def pick(self, usual: _T, quick: _T) -> _T:
        """Return one of two sizes."""
        return quick if self.quick else usual

    def turns(self, arms: Mapping[str, Callable[[], Any]], warm_up: int = 2, pairs: int | None = None) -> Turns:
        """Time arms in turns, on the device."""
        wait = torch.cuda.synchronize if self.device.startswith("cuda") else None
        return take_turns(arms, self.pick(pairs or self.pairs, 2), self.pick(warm_up, 1), wait=wait)


@dataclass(frozen=True)
class Block:
    """Numbers that belong together: arms that took turns, and what else was found out on the way.

    Args:
        key: Short name, by which goals refer to it.
        title: What was run, with its sizes.
        turns: Times of the arms; ``None`` where nothing was timed.
        values: Other numbers by name.
        columns: Numbers of single arms: a mapping from arm to number for each name.
        kernel: The kernel that took most of the time of the arm to beat.
    """

    key: str
    title: str
    turns: Turns | None = None
    values: Mapping[str, Interval] = field(default_factory=dict)
    columns: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    kernel: str | None = None

    def number(self, of: str | tuple[str, str]) -> Interval:
        """Return a value by name, or the ratio of two arms."""
        if isinstance(of, str):
            return self.values[of]
        if self.turns is None:
            raise ValueError(f"`{self.key}` has no times; asked for {of}.")
        return self.turns.ratio(*of)

    def plain(self) -> dict[str, Any]:
        """Return this block as plain numbers, for JSON."""
        arms: dict[str, dict[str, float]] = {}
        if self.turns is not None:
            arms = {name: comparison._asdict() for name, comparison in self.turns.table().items()}
        for column, numbers in self.columns.items():
            for arm, number in numbers.items():
                arms.setdefault(arm, {})[column] = number
        return {
            "key": self.key,
            "title": self.title,
            "pairs": 0 if self.turns is None else len(next(iter(self.turns.wall.values()))),
            "kernel": self.kernel,
            "arms": arms,
            "values": {name: value._asdict() for name, value in self.values.items()},
        }


@dataclass(frozen=True)
class Goal:
    """A promise in numbers, written down before it is measured.

    Args:
        number: Which goal, such as ``G6``.
        quantity: What is measured, in words.
        bound: The number promised.
        predicted: What was expected before the first measurement; ``None`` for a goal that was added later.
        limit: What physics allows, and why.
        between: What stands between the measured number and the limit.
        block: Key of the block that has it.
        of: Name of a value of that block, or two arms whose ratio it is.
        at_least: The number shall be at least ``bound``, not at most.
        on_cuda: The number promised on a CUDA device; ``None`` is ``bound``.
        unit: Of the number; ratios have none.
    """

    number: str
    quantity: str
    bound: float
    predicted: float | None
    limit: str
    between: str
    block: str
    of: str | tuple[str, str]
    at_least: bool = False
    on_cuda: float | None = None
    unit: str = ""

    def bound_on(self, device: str) -> float:
        """Return what is promised on a device."""
        return self.on_cuda if device.startswith("cuda") and self.on_cuda is not None else self.bound

    def verdict(self, measured: Interval, device: str = "cpu") -> Verdict:
        """Judge; a goal is missed only if the whole interval lies beyond it."""
        sign, bound = (-1.0 if self.at_least else 1.0), self.bound_on(device)
        if sign * measured.value <= sign * bound:
            return "met"
        nearest = measured.high if self.at_least else measured.low
        return "undecided" if sign * nearest <= sign * bound else "missed"

    def judged(self, blocks: Mapping[str, Block], device: str) -> dict[str, Any]:
        """Return the goal, and what was measured where its block was run, as plain numbers for JSON."""
        facts = {**asdict(self), "bound": self.bound_on(device), "measured": None, "verdict": None}
        del facts["on_cuda"]
        if self.block not in blocks:
            return facts
        measured = blocks[self.block].number(self.of)
        return {**facts, "measured": measured._asdict(), "verdict": self.verdict(measured, device)}


@dataclass(frozen=True)
class Table:
    """A benchmark that can be run by name.

    Args:
        name: Its name, which is that of its module.
        title: What it measures.
        goals: What it shall show.
        run: Yields blocks, each as soon as it is measured.
    """

    name: str
    title: str
    goals: tuple[Goal, ...]
    run: Callable[[Setting], Iterable[Block]]
