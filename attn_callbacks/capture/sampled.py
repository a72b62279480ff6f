"""Statistics of heads from some rows of a call."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_callbacks.capture.call import AttentionCall
from attn_callbacks.functional._frame import Frame
from attn_callbacks.functional.statistics import logit_statistics, weight_statistics

__all__ = ["sampled_head_statistics"]


@torch.no_grad()
def sampled_head_statistics(
    call: AttentionCall, rows: Tensor | None, drawn: Tensor | None, long_range: float = 0.25
) -> Tensor:
    """Describe every head of a call by its drawn rows, or by all of them, on every sample.

    The ten numbers of :func:`attn_callbacks.functional.head_statistics`, for calls of every kind. For long sequences:
    costs time and memory of ``rows x keys`` a head, however many queries there are. Their mean over samples estimates
    the one over all rows without bias when the rows are drawn by :func:`attn_callbacks.functional.stratified_rows`;
    ``max_logit`` is that of the drawn rows.

    Args:
        call: Attention of one layer.
        rows: Indices of the queries to look at; ``None`` looks at all.
        drawn: ``True`` for the rows that count; ``None``: all.
        long_range: What counts as far away, as in ``head_statistics``.

    Shape:
        - rows: ``(batch, rows)`` or ``(rows,)``
        - drawn: bool ``(batch, rows)``
        - output: ``(batch, heads, statistics)``, float32 without a graph, along ``STATISTICS``; NaN where a statistic
          has no row

    Raises:
        ValueError: If a shape does not fit or ``long_range`` is not positive.

    Example:
        >>> from attn_callbacks.functional import stratified_rows
        >>> tokens = torch.zeros(1, 2, 8, 4)
        >>> call = AttentionCall("attention", query=tokens, key=tokens)
        >>> rows, drawn = stratified_rows(call.query_valid, 4, torch.Generator())
        >>> sampled_head_statistics(call, rows, drawn)[0, 0, :3]  # entropy, normalised entropy, confidence
        tensor([2.0794, 1.0000, 0.1250])
    """
    square = not call.is_cross and call.shape[2] == call.shape[3]
    frame = Frame(rows, call.allowed(rows), drawn, call.key_valid, long_range, square)
    logits = call.logits(rows)
    return weight_statistics(call.weights(rows), None, frame) if logits is None else logit_statistics(logits, frame)
