"""The level that accuracy usually has, and when it is below that: chance alone shall rarely look like a fall."""

from __future__ import annotations

import math
from typing import NamedTuple

__all__ = ["AccuracyLevel", "compared"]

_ERRORS = 2.0
_MEMORY = 8  # reports that the running mean is about as old as
_CLIMB = 0.5  # weight of a report that is clearly above the level: one that learns must not drag its beginning along


class AccuracyLevel(NamedTuple):
    """Running mean of accuracy over reports.

    Args:
        mean: The mean.
        error: Standard error of one report at this level.
        reports: How many it has taken in.
    """

    mean: float
    error: float
    reports: int


def compared(
    level: AccuracyLevel | None, now: float, error: float, tolerance: float
) -> tuple[AccuracyLevel | None, bool]:
    """Return the level with a report taken in, and whether accuracy has fallen below the level before.

    It has if it is lower by more than ``tolerance`` and by more than two standard errors of the difference of two
    reports. The best report so far would be no yardstick: the more reports, the luckier the best. A report that has
    fallen leaves the level as it is, so that what was lost stays lost until accuracy is back.

    Args:
        level: What it returned before; ``None`` at the first report.
        now: Accuracy in the report; NaN was not measured, and changes nothing.
        error: Its standard error.
        tolerance: Fall that is accepted in any case.

    Example:
        >>> level, fell = compared(None, 0.9, 0.01, 0.02)
        >>> level, fell = compared(level, 0.88, 0.01, 0.02)
        >>> round(level.mean, 2), fell
        (0.89, False)
        >>> compared(level, 0.8, 0.01, 0.02)[1]
        True
    """
    if math.isnan(now):
        return level, False
    if level is None:
        return AccuracyLevel(now, error, 1), False
    beyond = max(tolerance, _ERRORS * math.hypot(level.error, error))
    if level.mean - now > beyond:
        return level, True
    weight = _CLIMB if now - level.mean > beyond else 1 / min(level.reports + 1, _MEMORY)
    mean, spread = (old + weight * (new - old) for old, new in ((level.mean, now), (level.error, error)))
    return AccuracyLevel(mean, spread, level.reports + 1), False
