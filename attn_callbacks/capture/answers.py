"""What a call answers: values of its queries, which of them count, and whether all queries were looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from attn_callbacks.functional.rows import row_mean

__all__ = ["CallSummary", "RowStatistic", "TopKeys"]


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


class CallSummary(NamedTuple):
    """What one pass over the scores of a call tells; without a graph.

    Args:
        entropy: In nats.
        confidence: Largest weight.
        max_logit: Largest score before the softmax.
        logsumexp: Log-sum-exp of the scores.
        expectation: Mean of the features that were asked for.
        received_mass: Weight that each key gets from all valid queries, ``(batch, heads, keys)``.
    """

    entropy: RowStatistic
    confidence: RowStatistic
    max_logit: RowStatistic
    logsumexp: RowStatistic
    expectation: RowStatistic
    received_mass: Tensor


class TopKeys(NamedTuple):
    """The keys with the largest weights, ``(batch, heads, rows, k)`` each, largest first."""

    values: Tensor
    indices: Tensor
