"""Print blocks and goals as tables a person can read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.table import Block

__all__ = ["readable", "show_block", "show_goals"]


def readable(number: float) -> str:
    """Three digits that matter, without an exponent."""
    if number != number:
        return "-"
    if number == int(number) and abs(number) < 10_000:
        return str(int(number))
    if abs(number) >= 100:
        return f"{number:,.0f}"
    digits = 3 if abs(number) < 2 else 2 if abs(number) < 10 else 1
    return f"{number:.{digits}f}" if abs(number) >= 0.05 else f"{number:.2g}"


def show_block(block: Block) -> None:
    """Print the arms, each relative to the first, and the other numbers."""
    facts = block.plain()
    print(f"\n{block.title}" + (f"   ({facts['pairs']} pairs)" if facts["pairs"] else ""))
    if block.kernel:
        print(f"kernel: {block.kernel}")
    width = max([34, *map(len, facts["arms"])])
    if block.turns is not None:
        columns = "".join(f"{column:>16s}" for column in block.columns)
        print(f"{'':{width}s} {'ms':>9s} {'ratio':>7s}   {'95 % interval':16s} min/min   cpu time{columns}")
    for name, arm in facts["arms"].items():
        print(f"{name:{width}s} " + _times(arm) + _rest(arm, block))
    for name, value in block.values.items():
        ends = "" if value.low == value.high else f" [{readable(value.low)}, {readable(value.high)}]"
        print(f"{name:{width}s} {readable(value.value):>9s}{ends}")


def show_goals(goals: Sequence[dict[str, Any]]) -> None:
    """Print what was promised, what was expected and what came."""
    for goal in goals:
        if goal["measured"] is None:
            continue
        measured, promise = goal["measured"], "at least" if goal["at_least"] else "at most"
        print(
            f"{goal['number']:4s} {goal['verdict']:9s} {readable(measured['value'])} "
            f"[{readable(measured['low'])}, {readable(measured['high'])}]{goal['unit'] and ' ' + goal['unit']}, "
            f"{promise} {readable(goal['bound'])}, predicted {goal['predicted']}: {goal['quantity']}"
        )


def _times(arm: dict[str, float]) -> str:
    if "ratio" not in arm:
        return ""
    interval = f"[{arm['low']:.3f}, {arm['high']:.3f}]"
    return (
        f"{1000 * arm['seconds']:9.2f} {arm['ratio']:7.3f}   {interval:16s} "
        f"{arm['least_ratio']:7.3f}    {arm['process_ratio']:7.3f}"
    )


def _rest(arm: dict[str, float], block: Block) -> str:
    if block.turns is None:
        return "   ".join(f"{column} {readable(arm[column])}" for column in block.columns if column in arm)
    return "".join(f"{readable(arm[column]) if column in arm else '':>16s}" for column in block.columns)
