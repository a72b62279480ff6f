"""What observers cost a training run: whole small epochs, single validations, and the steps between captures.

An epoch of fine-tuning takes many minutes, and fifteen pairs of it a day. Instead, small epochs are measured whole,
with a validation and a log point after 10 steps, which is far more often than usual; and an epoch of 20,000 sentences
with a validation of 872 (about 730 training sentences a validation batch) is computed from its measured parts: 1,250
steps, and a validation with its log point, continued in a line from validations of two and of four batches.

Run: ``python -m benchmarks.training [--out FOLDER] [--quick]``.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.paired import Interval, Turns, median_interval
from benchmarks.runner import main
from benchmarks.table import Block, Goal, Setting, Table

if TYPE_CHECKING:
    from benchmarks.fine_tuning import Workload
    from benchmarks.fits import Fit

TRAINING, VALIDATION = 320, 128
LONG_EPOCH_STEPS, LONG_VALIDATION = 20_000 // 16, 872
OFF, ON, MAPS = "no observer", "all three observers", "eager maps, the same but max_logit"
STEP, EPOCH = "step between captures, on / off", "epoch of 20,000 sentences, on / off"
TWICE = ", twice the sentences"
MICROSECONDS, DIFFERENT = "microseconds a step between captures", "losses and weights that differ"


def run(setting: Setting) -> Iterator[Block]:
    """Measure validations, epochs and steps."""
    from benchmarks import fits  # Lightning and transformers take seconds to import

    with tempfile.TemporaryDirectory() as folder:
        if setting.quick:
            workload = fits.random_fine_tuning(64, 16, width=32, layers=2, heads=2)
        else:
            workload = fits.fine_tuning(TRAINING, VALIDATION)
        validations = _validations(setting, workload, folder)
        title = f"validation of {len(workload.validation) // 2} sentences, with its log point; {workload.name}"
        yield Block("validation", title, validations)
        yield _epochs(setting, workload, folder, validations)
        tiny = fits.random_fine_tuning(setting.pick(16 * 60, 64), 4, width=32, layers=1, heads=2)
        yield _steps(setting, tiny, folder)


def _validations(setting: Setting, workload: Workload, folder: str) -> Turns:
    """Each observer alone, all of them, the other way to get head statistics, and twice as many sentences."""
    from benchmarks.fits import OBSERVERS, observers, validation

    half, whole = len(workload.validation) // 2, len(workload.validation)

    def alone(observer: Any) -> Callable[[], object]:
        return validation(workload, folder, lambda: [observer()], half)

    arms = {OFF: validation(workload, folder, list, half)}
    arms |= {observer.__name__: alone(observer) for observer in OBSERVERS}
    arms[ON] = validation(workload, folder, observers, half)
    arms[MAPS] = validation(workload, folder, list, half, by_returned_maps=True)
    arms[OFF + TWICE] = validation(workload, folder, list, whole)
    arms[ON + TWICE] = validation(workload, folder, observers, whole)
    return setting.turns(arms, warm_up=1)


def _epochs(setting: Setting, workload: Workload, folder: str, validations: Turns) -> Block:
    """Whole small epochs with and without observers, whose losses and weights have to agree."""
    turns, off, on = _fitted(setting, workload, folder, validation=len(workload.validation) // 4)
    values = {
        STEP: median_interval(_step_ratios(off, on)),
        EPOCH: median_interval(_long_epochs(off, on, validations, len(workload.validation))),
        DIFFERENT: Interval.exact(sum(_differences(a, b) for a, b in zip(off, on, strict=True))),
    }
    title = f"epoch of {len(workload.training)} training sentences, validation of {len(workload.validation) // 4}"
    return Block("epoch", f"{title}; {workload.name}", turns, values)


def _steps(setting: Setting, workload: Workload, folder: str) -> Block:
    """Steps so short that microseconds show."""
    turns, off, on = _fitted(setting, workload, folder, validation=4)
    extra = [1e6 * np.median(b.seconds - a.seconds) for a, b in zip(off, on, strict=True)]
    values = {MICROSECONDS: median_interval(np.array(extra)), STEP: median_interval(_step_ratios(off, on))}
    return Block("steps", f"epoch of {len(workload.training) // 16} short steps; {workload.name}", turns, values)


def _fitted(setting: Setting, workload: Workload, folder: str, validation: int) -> tuple[Turns, list[Fit], list[Fit]]:
    from benchmarks.fits import fit, observers

    off, on = [], []
    arms = {
        OFF: lambda: off.append(fit(workload, folder, [], validation)),
        ON: lambda: on.append(fit(workload, folder, observers(), validation)),
    }
    turns = setting.turns(arms, warm_up=1)
    return turns, off[1:], on[1:]  # the first was to warm up


def _step_ratios(off: list[Fit], on: list[Fit]) -> np.ndarray[Any, Any]:
    """Median over the steps of a fit, each beside the step on the same sentences without observers."""
    return np.array([np.median(b.seconds / a.seconds) for a, b in zip(off, on, strict=True)])


def _long_epochs(off: list[Fit], on: list[Fit], validations: Turns, size: int) -> np.ndarray[Any, Any]:
    """Put an epoch of usual length together from steps and validations, and relate on to off, turn by turn."""
    step = np.array([np.median(fit.seconds) for fit in off])

    def validated(arm: str) -> np.ndarray[Any, Any]:
        """Continue the line from the two sizes, in units of the smaller one."""
        once, twice = validations.wall[arm], validations.wall[arm + TWICE]
        seconds: np.ndarray[Any, Any] = once + (twice - once) * (LONG_VALIDATION / (size / 2) - 1)
        return seconds

    without = LONG_EPOCH_STEPS * step + validated(OFF)
    ratios: np.ndarray[Any, Any] = (LONG_EPOCH_STEPS * step * _step_ratios(off, on) + validated(ON)) / without
    return ratios


def _differences(off: Fit, on: Fit) -> int:
    return int((off.losses != on.losses).sum()) + int((off.weights != on.weights).sum())


TABLE = Table(
    "training",
    "Fine-tuning with and without observers, default settings",
    (
        Goal(
            "G1",
            "epoch of 20,000 sentences with a validation of 872, all observers on / off (computed from parts)",
            bound=1.03,
            on_cuda=1.01,
            predicted=1.01,
            limit="1.0002: 64 rows of a few batches",
            between="Python around short calls on validation batches; pictures",
            block="epoch",
            of=EPOCH,
        ),
        Goal(
            "G1",
            "epoch of 320 sentences with a validation of 32, all observers on / off (measured whole)",
            bound=1.03,
            on_cuda=1.01,
            predicted=1.04,
            limit="the same",
            between="a log point, with 34 pictures, every 20 steps",
            block="epoch",
            of=(ON, OFF),
        ),
        Goal(
            "G2",
            "training step between captures, all observers on / off, MiniLM",
            bound=1.002,
            predicted=1.000,
            limit="1: nothing is installed",
            between="hooks of a Trainer that return at once",
            block="epoch",
            of=STEP,
        ),
        Goal(
            "G2",
            "time that observers add to a step between captures",
            bound=50,
            predicted=20,
            limit="0",
            between="the same",
            block="steps",
            of=MICROSECONDS,
            unit="µs",
        ),
        Goal(
            "G20",
            "losses and final weights that differ between runs with and without observers",
            bound=0,
            predicted=0,
            limit="0",
            between="nothing",
            block="epoch",
            of=DIFFERENT,
        ),
    ),
    run,
)

if __name__ == "__main__":
    sys.exit(main([TABLE.name, *sys.argv[1:]]))
