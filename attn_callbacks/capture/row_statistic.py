"""What a call answers: one value a query, which of them count, and whether all queries were looked at."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attn_callbacks.functional.rows import row_mean

__all__ = ["RowStatistic"]


@dataclass(frozen=True, eq=False)
class RowStatistic:
    """A statistic of every query's attention, or of a stratified sample of the queries.

    Args:
        values: One value (or several features) a row; 0 for rows that do not count, never NaN.
        counted: ``True`` for the rows that count: those of a real token with a key to attend to and, where a statistic
            is about a certain key, where that key exists.
        rows: Query of each row, where only some were looked at; ``None``: row ``i`` is query ``i``.

    Shape:
        - values: ``(batch, heads, rows)`` or ``(batch, heads, rows, features)``
        - counted: bool, ``(batch, heads, rows)``
        - rows: ``(batch, rows)``
    """

    values: Tensor
    counted: Tensor
    rows: Tensor | None = None

    @property
    def is_exact(self) -> bool:
        """Every query was looked at."""
        return self.rows is None

    def mean(self) -> Tensor:
        """Average over the rows that count: ``(batch, heads)`` or ``(batch, heads, features)``, NaN without any."""
        if self.values.ndim == 3:
            return row_mean(self.values, self.counted)
        return row_mean(self.values.transpose(-2, -1), self.counted[:, :, None])
