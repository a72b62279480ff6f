"""How far each cell lies from the mean of all: on average, and at present."""

from __future__ import annotations

import math
from collections.abc import Sequence

from attn_callbacks.feedback.weight_policies import centre_rows

__all__ = ["agreed", "averaged", "deviations", "standard_error"]


def averaged(
    old: Sequence[float], new: Sequence[float], settled: Sequence[float], smoothing: float
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    r"""Average exponentially, corrected for the start: the first of two measurements does not outweigh the second.

    After :math:`t` measurements the last has the share :math:`(1 - b) / (1 - b^t)`: 1, then :math:`1 / (1 + b)`, and in
    the end :math:`1 - b`.

    Args:
        old: Averages; NaN where there is none yet.
        new: Measurements; NaN where there is none.
        settled: :math:`1 - b^t` of each average; empty if all have settled that there are.
        smoothing: Share of the old average in the new one, in the end.

    Returns:
        Averages, and how settled they are.

    Example:
        >>> averaged([0.0, 0.0], [0.6, math.nan], [0.5, 0.5], 0.5)
        ((0.4, 0.0), (0.75, 0.5))
    """
    settled = settled or [0.0 if math.isnan(value) else 1.0 for value in old]
    pairs = []
    for before, now, part in zip(old, new, settled, strict=True):
        if math.isnan(now):
            pairs.append((before, part))
            continue
        after = smoothing * part + 1 - smoothing
        first = math.isnan(before) or part == 0
        pairs.append((now if first else before + (now - before) * (1 - smoothing) / after, after))
    return tuple(value for value, _ in pairs), tuple(part for _, part in pairs)


def deviations(
    values: Sequence[float], measured: Sequence[bool], uncertain: Sequence[float] | None = None, dead_band: float = 0.0
) -> list[float]:
    """Return how far each measured cell lies below the mean of all; 0 within the dead band or the standard error.

    Args:
        values: Recall or F1 of each cell.
        measured: Which cells count.
        uncertain: Standard error of each value; ``None``: they are certain.
        dead_band: Deviations up to this are 0.
    """
    known = [value for value, use in zip(values, measured, strict=True) if use]
    if not known:
        return [0.0] * len(values)
    mean = math.fsum(known) / len(known)
    errors = [mean - value if use else 0.0 for value, use in zip(values, measured, strict=True)]
    least = [max(dead_band, own) for own in uncertain or [0.0] * len(errors)]
    return [error if abs(error) > low else 0.0 for error, low in zip(errors, least, strict=True)]


def agreed(
    errors: Sequence[float], present: Sequence[float], measured: Sequence[bool], width: int | None = None
) -> list[float]:
    """Return the smaller of the average and the present deviation of each cell; 0 where they have different signs.

    An average still tells of what is over. Followed all the same, it would wind the weights up: beyond balance, and in
    the wrong direction from then on.

    Args:
        errors: Deviations to follow.
        present: The same of the last report.
        measured: Which cells it measured; the others are 0 in both.
        width: Cells in a row within which alone differences act: there those from the mean of the row are compared.
    """
    if width is not None:
        errors, present = centre_rows(errors, width, measured), centre_rows(present, width, measured)
    return [
        math.copysign(min(abs(error), abs(now)), error) if error * now > 0 else 0.0
        for error, now in zip(errors, present, strict=True)
    ]


def standard_error(value: float, size: int) -> float:
    """Return that of a share of ``size``, with one hit and one miss added; 0 where nothing is known."""
    if math.isnan(value):
        return 0.0
    smoothed = (value * size + 1) / (size + 2)
    return math.sqrt(smoothed * (1 - smoothed) / (size + 2))
