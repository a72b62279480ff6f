"""Markdown tables that also line up in a terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor

__all__ = ["MAX_ROWS", "Columns", "cell_text", "chance", "lowest_rows", "number", "table", "with_interval"]

MAX_ROWS = 40
"""Rows of one table; of more, those with the lowest rates are shown."""

Columns = Mapping[str, Callable[[int], str]]
"""Title of each column, and what it shows for an index."""


def table(
    title: str, rows: Sequence[int], names: Sequence[str], columns: Columns, words: Sequence[str] = ()
) -> Iterator[str]:
    """Yield the lines of a table, with an empty one before.

    Args:
        title: Title of the names.
        rows: Indices to show.
        names: Name of each index.
        columns: The other columns.
        words: Titles of those that hold words, which begin at the left.
    """
    body = [[cell_text(names[row]), *(cell_text(column(row)) for column in columns.values())] for row in rows]
    lines = [[title, *columns], *body]
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    left = [name in (title, *words) for name in lines[0]]
    rule = [f"{'-' * (width + 1)}{'-' if at_left else ':'}" for width, at_left in zip(widths, left, strict=True)]
    yield ""
    for count, line in enumerate(lines):
        cells = [
            text.ljust(width) if at_left else text.rjust(width)
            for text, width, at_left in zip(line, widths, left, strict=True)
        ]
        yield f"| {' | '.join(cells)} |"
        if count == 0:
            yield f"|{'|'.join(rule)}|"
    if len(names) > len(rows):
        yield f"\nThe {len(rows)} lowest of {len(names)} are shown."


def lowest_rows(rates: Tensor) -> list[int]:
    """Return the rows to show, in their own order; the lowest rates where not all fit."""
    indices = range(len(rates))
    if len(rates) <= MAX_ROWS:
        return list(indices)
    values: list[float] = rates.nan_to_num(math.inf).tolist()
    return sorted(sorted(indices, key=lambda index: values[index])[:MAX_ROWS])


def cell_text(text: str) -> str:
    """Return a text that cannot break a table."""
    return " ".join(text.split()).replace("|", "\\|")


def number(value: Tensor | float, digits: int = 3) -> str:
    """Write a figure; ``n/a`` for one that was not measured."""
    plain = float(value)
    return "n/a" if math.isnan(plain) else f"{plain:.{digits}f}"


def with_interval(value: Tensor | float, interval: Sequence[float] | Tensor, digits: int = 3) -> str:
    """Write a figure and its interval, in brackets and with a digit less; without one, the figure alone."""
    low, high = (float(bound) for bound in interval)
    if math.isnan(float(value)) or math.isnan(low):
        return number(value, digits)
    return f"{number(value, digits)} [{low:.{digits - 1}f}, {high:.{digits - 1}f}]"


def chance(p_value: Tensor | float) -> str:
    """Write a p-value."""
    plain = float(p_value)
    return "<0.001" if plain < 0.001 else number(plain)
