"""How much of a head's attention lies where a pattern expects it, beside what uniform attention puts there."""

from __future__ import annotations

from torch import Tensor

from attn_callbacks._checks import check_axes
from attn_callbacks.functional._frame import Frame
from attn_callbacks.functional._maps import Maps, measured, of_one_head
from attn_callbacks.functional._scores import PatternScores

__all__ = ["PatternScores", "pattern_scores"]


def pattern_scores(
    weights: Tensor, targets: Tensor, *, allowed: Tensor | None = None, valid: Tensor | None = None
) -> PatternScores:
    """Measure the attention mass on the keys that each of several patterns expects of each query.

    For a pattern of your own. Rows without an expected key count neither in the score nor in its denominator; which
    share of rows is left is the coverage. One matrix product over ``weights`` for all patterns together.

    Args:
        weights: Attention weights, each row summing to one, zero where a query may not attend.
        targets: ``True`` for the expected keys of each row.
        allowed: ``True`` where a row may attend; needed for causal and padded attention. ``None``: everywhere. A mask
            that is written out for each head takes the heads one by one.
        valid: ``True`` for the rows that count; padded queries are ``False``.

    Shape:
        - weights: ``(batch, heads, rows, keys)``
        - targets: bool ``(batch, patterns, rows, keys)``, or with a first axis of 1
        - allowed: bool, broadcastable to ``weights``
        - valid: bool ``(batch, rows)`` or ``(batch, heads, rows)``
        - output: each field ``(batch, heads, patterns)``, float32; score and chance are NaN where no row has a target

    Raises:
        ValueError: If a shape does not fit.

    Example:
        >>> import torch
        >>> weights = torch.tensor([[[[1.0, 0.0], [0.25, 0.75]]]])
        >>> causal = torch.ones(2, 2, dtype=torch.bool).tril()
        >>> found = pattern_scores(weights, torch.eye(2, dtype=torch.bool)[None, None], allowed=causal)
        >>> found.score.item(), found.chance.item(), found.strength().item()  # each token on itself
        (0.875, 0.75, 0.5)

    References:
        Mass over rows with a target is the score "mul" of TransformerLens' head detector, divided by those rows only.
        The correction for chance is the one of Cohen's kappa (1960).
    """
    check_axes("weights", weights, 4)
    check_axes("targets", targets, 4)
    batch, _, rows, keys = weights.shape
    if targets.shape[0] not in (1, batch) or targets.shape[2:] != (rows, keys):
        raise ValueError(
            f"`targets` must have shape (batch or 1, patterns, rows, keys) = ({batch} or 1, patterns, {rows}, {keys}), "
            f"got {tuple(targets.shape)}."
        )
    frame = Frame(allowed=of_one_head(allowed, weights.shape[1]), valid=valid)

    def measure(*parts: Tensor) -> PatternScores:
        return Maps.counted(*parts).on_pairs(targets.bool())

    return measured(measure, weights, frame.pairs(weights), frame.wanted(weights))
