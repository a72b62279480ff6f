from __future__ import annotations

import numpy as np
import pytest

from benchmarks.paired import Interval, median_interval, take_turns
from benchmarks.table import Block, Goal


class Clock:
    """Time that passes only when an arm says so."""

    def __init__(self):
        self.now = 0.0
        self.speed = 1.0

    def __call__(self):
        return self.now

    def spend(self, seconds):
        self.now += self.speed * seconds


def arms_of(wall, process, log=None):
    def arm(name, seconds, busy):
        def run():
            wall.spend(seconds)
            process.spend(busy)
            if log is not None:
                log.append(name)

        return run

    return {"one": arm("one", 1.0, 1.0), "two": arm("two", 2.0, 6.0)}


def test_an_arm_that_takes_twice_as_long_has_the_ratio_two():
    wall, process = Clock(), Clock()
    turns = take_turns(arms_of(wall, process), pairs=15, clocks=(wall, process))
    two = turns.compared("two", "one")
    assert (two.seconds, two.ratio, two.low, two.high, two.least_ratio) == (2, 2, 2, 2, 2)
    assert (two.process_seconds, two.process_ratio, two.process_low, two.process_high) == (6, 6, 6, 6)
    assert turns.ratio("one", over="two") == (0.5, 0.5, 0.5)
    assert turns.table()["one"].ratio == 1


def test_ratios_are_taken_within_turns():
    """A machine that becomes slower from turn to turn changes no ratio; a ratio of medians over other turns would."""
    wall, process = Clock(), Clock()
    arms = arms_of(wall, process)

    def slower():
        arms["two"]()
        wall.speed *= 1.5

    turns = take_turns({"one": arms["one"], "two": slower}, pairs=4, warm_up=0, clocks=(wall, process))
    # forwards the second arm runs before the machine slows down, backwards it slows down before the first arm
    np.testing.assert_allclose(turns.wall["two"] / turns.wall["one"], [2, 2 / 1.5, 2, 2 / 1.5])


def test_arms_take_turns_forwards_and_backwards():
    log = []
    take_turns(arms_of(Clock(), Clock(), log), pairs=3, warm_up=1)
    assert log == ["one", "two", "one", "two", "two", "one", "one", "two"]


def test_the_device_finishes_before_a_clock_is_read():
    wall, waiting = Clock(), []

    def wait():
        wall.spend(sum(waiting))
        waiting.clear()

    arms = {"one": lambda: waiting.append(1.0), "two": lambda: waiting.append(2.0)}
    assert take_turns(arms, pairs=3, clocks=(wall, Clock()), wait=wait).compared("two", "one").ratio == 2


def test_the_interval_holds_the_median_and_shrinks_with_more_pairs():
    draw = np.random.default_rng(0)
    few, many = (median_interval(draw.normal(3.0, 1.0, size)) for size in (15, 1500))
    assert few.low < few.value < few.high
    assert many.high - many.low < (few.high - few.low) / 3
    held = [median_interval(draw.normal(3.0, 1.0, 15)) for _ in range(200)]
    assert 0.88 < np.mean([interval.low <= 3.0 <= interval.high for interval in held]) <= 1.0


def test_a_table_relates_all_arms_to_the_first():
    results = take_turns({"one": lambda: None, "same": lambda: None}, pairs=3, warm_up=0).table()
    assert list(results) == ["one", "same"]
    assert results["one"].ratio == results["one"].low == results["one"].high == 1.0


def goal(**changes):
    facts = {"number": "G0", "quantity": "q", "bound": 2.0, "predicted": 1.0, "limit": "", "between": "", "block": "b"}
    return Goal(**{**facts, "of": "value", **changes})


@pytest.mark.parametrize(
    ("measured", "at_most", "at_least"),
    [
        ((1.5, 1.4, 1.6), "met", "missed"),
        ((1.9, 1.8, 2.1), "met", "undecided"),
        ((2.0, 2.0, 2.0), "met", "met"),
        ((2.1, 1.9, 2.2), "undecided", "met"),
        ((2.1, 2.05, 2.2), "missed", "met"),
    ],
)
def test_a_goal_is_missed_only_if_its_whole_interval_lies_beyond(measured, at_most, at_least):
    assert goal().verdict(Interval(*measured)) == at_most
    assert goal(at_least=True).verdict(Interval(*measured)) == at_least


def test_a_gpu_has_goals_of_its_own():
    strict = goal(on_cuda=1.1)
    assert strict.verdict(Interval.exact(1.5)) == "met"
    assert strict.verdict(Interval.exact(1.5), "cuda:0") == "missed"


def test_a_goal_reads_a_value_or_a_ratio_of_its_block():
    wall, process = Clock(), Clock()
    turns = take_turns(arms_of(wall, process), pairs=2, clocks=(wall, process))
    blocks = {"b": Block("b", "title", turns, {"value": Interval(1, 0, 3)})}
    assert goal().judged(blocks, "cpu")["measured"] == {"value": 1, "low": 0, "high": 3}
    assert goal(of=("one", "two")).judged(blocks, "cpu")["measured"]["value"] == 0.5
    assert goal(block="not run").judged(blocks, "cpu")["measured"] is None
    with pytest.raises(KeyError, match="mistyped"):
        goal(of="mistyped").judged(blocks, "cpu")
