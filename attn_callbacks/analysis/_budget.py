"""How far an experiment is, and whether its time is up."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

__all__ = ["Budget", "Progress"]

Progress = Callable[[float], None] | bool

_WIDTH = 40


class Budget:
    """Counts what was done of what is to be done.

    Args:
        seconds: Time from now on; ``None``: as long as it takes.
        progress: Called with the share that is done, from 0 to 1; ``True`` draws a bar on standard error.

    Raises:
        ValueError: If ``seconds`` is not above 0.

    Example:
        >>> shares = []
        >>> budget = Budget(None, shares.append)
        >>> budget.plan(4)
        >>> budget.step()
        >>> shares, budget.is_spent
        ([0.0, 0.25], False)
    """

    def __init__(self, seconds: float | None, progress: Progress) -> None:
        if seconds is not None and not seconds > 0:
            raise ValueError(f"`seconds` must be above 0, or None, got {seconds}.")
        self._ends = None if seconds is None else time.monotonic() + seconds
        self._tell = _bar if progress is True else progress or (lambda share: None)
        self._total, self._done = 1, 0

    @property
    def is_spent(self) -> bool:
        """The time is up."""
        return self._ends is not None and time.monotonic() >= self._ends

    @property
    def was_enough(self) -> bool:
        """Everything planned was done."""
        return self._done >= self._total

    @property
    def is_untouched(self) -> bool:
        """Nothing was done yet."""
        return self._done == 0

    def plan(self, steps: int) -> None:
        """Say how many steps there will be."""
        self._total, self._done = max(1, steps), 0
        self._tell(0.0)

    def expect(self, steps: int) -> None:
        """Say how many steps are left after all."""
        total = max(1, self._done + steps)
        if total != self._total:
            self._total = total
            self._tell(min(1.0, self._done / total))

    def step(self, steps: int = 1) -> None:
        """Say that some are done."""
        self._done += steps
        self._tell(min(1.0, self._done / self._total))


def _bar(share: float) -> None:
    full = round(share * _WIDTH)
    sys.stderr.write(f"\r[{'#' * full}{'.' * (_WIDTH - full)}] {share:4.0%}{chr(10) if share >= 1 else ''}")
    sys.stderr.flush()
