"""Patterns read off a whole attention map: how uniform it is, its strongest stripe, and where its maxima lie."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_callbacks._checks import check_axes, integer
from attn_callbacks.functional._frame import Frame
from attn_callbacks.functional._maps import Maps, measured, of_one_head
from attn_callbacks.functional._scores import PatternScores
from attn_callbacks.functional.rows import row_mean

__all__ = ["offset_share", "uniformity", "vertical_mass"]


def uniformity(weights: Tensor, *, allowed: Tensor | None = None, valid: Tensor | None = None) -> PatternScores:
    """Measure the share of attention that lies as uniform attention over the allowed keys would have it.

    Of a row with ``n`` allowed keys: ``sum_j min(A[i, j], 1 / n)``, one minus the total variation distance from the
    uniform row. Unlike normalised entropy it means the same at every length: a head that is uniform over half of the
    keys has 1/2. ``chance`` is the least there can be, ``1 / n``. Two passes over ``weights``.

    Args:
        weights: Attention weights, each row summing to one.
        allowed: ``True`` where a row may attend; ``None``: everywhere.
        valid: ``True`` for the rows that count.

    Shape:
        - weights: ``(batch, heads, rows, keys)``
        - allowed: bool, broadcastable to ``weights``
        - valid: bool ``(batch, rows)`` or ``(batch, heads, rows)``
        - output: each field ``(batch, heads)``, float32, NaN without a row

    Example:
        >>> uniformity(torch.tensor([[[[0.5, 0.5, 0.0, 0.0]]]])).score
        tensor([[0.5000]])
    """
    check_axes("weights", weights, 4)
    frame = Frame(allowed=of_one_head(allowed, weights.shape[1]), valid=valid)
    return measured(_overlap, weights, frame.pairs(weights), frame.wanted(weights))


def vertical_mass(weights: Tensor, *, allowed: Tensor | None = None, valid: Tensor | None = None) -> PatternScores:
    """Measure the mean mass on the one key that stands out most: a stripe down the map, a sink at any position.

    The key with the largest strength among those that at least half of the rows may attend to; late keys of a causal
    map, which hardly any row sees, cannot win. Being a maximum it is above zero for noise as well. One pass over
    ``weights``.

    Args:
        weights: Attention weights, each row summing to one, zero where a query may not attend.
        allowed: ``True`` where a row may attend; ``None``: everywhere.
        valid: ``True`` for the rows that count.

    Shape:
        - weights: ``(batch, heads, rows, keys)``
        - allowed: bool, broadcastable to ``weights``
        - valid: bool ``(batch, rows)`` or ``(batch, heads, rows)``
        - output: each field ``(batch, heads)``, float32, NaN where no key is seen by half of the rows

    Example:
        >>> vertical_mass(torch.tensor([[[[0.1, 0.8, 0.1], [0.2, 0.6, 0.2]]]])).score
        tensor([[0.7000]])

    References:
        Kovaleva et al., "Revealing the Dark Secrets of BERT", 2019, section 4.1 (the name; they give no formula);
        Darcet et al., "Vision Transformers Need Registers", 2023 (keys of high norm that draw attention).
    """
    check_axes("weights", weights, 4)
    frame = Frame(allowed=of_one_head(allowed, weights.shape[1]), valid=valid)
    return measured(_stripes, weights, frame.pairs(weights), frame.wanted(weights))


def offset_share(weights: Tensor, offset: int, *, allowed: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
    """Compute the share of rows whose largest weight lies ``offset`` keys from their own position, and nowhere else.

    Voita et al. call a head positional where this is at least 0.9 for the offset -1 or 1. Rows for which that key does
    not exist do not count. A tie is no maximum, so that uniform rows are not positional; the mass on the offset, which
    the roles go by, does not see the difference between a clear maximum and a bare one.

    Args:
        weights: Attention weights of self-attention.
        offset: Key minus query: -1 for the previous token, 1 for the next.
        allowed: ``True`` where a row may attend; ``None``: everywhere.
        valid: ``True`` for the rows that count.

    Shape:
        - weights: ``(batch, heads, tokens, tokens)``
        - allowed: bool, broadcastable to ``weights``
        - valid: bool ``(batch, tokens)`` or ``(batch, heads, tokens)``
        - output: ``(batch, heads)``, float32, NaN without a row

    Raises:
        ValueError: If a shape does not fit.
        TypeError: If ``offset`` is no integer.

    Example:
        >>> weights = torch.tensor([[[[1.0, 0.0, 0.0], [0.7, 0.3, 0.0], [0.5, 0.5, 0.0]]]])
        >>> offset_share(weights, -1)
        tensor([[0.5000]])

    References:
        Voita et al., "Analyzing Multi-Head Self-Attention", 2019, section 5.2.
    """
    check_axes("weights", weights, 4)
    frame = Frame(allowed=allowed, valid=valid)
    frame.queries(weights)  # raises unless the map is square
    pairs = frame.pairs(weights) & frame.wanted(weights)[..., None]
    seen = weights.detach().where(pairs, 0.0)
    keys = torch.arange(weights.shape[-1], device=weights.device)
    at = keys - integer("offset", offset) == keys[:, None]
    rows = (seen.sum(dim=-1) != 0) & (pairs & at).any(dim=-1)
    top = seen == seen.amax(dim=-1, keepdim=True)
    hit = (top & at).any(dim=-1) & (top.sum(dim=-1) == 1)
    return row_mean(hit.float(), rows)


def _overlap(weights: Tensor, pairs: Tensor, wanted: Tensor) -> PatternScores:
    return Maps.counted(weights, pairs, wanted).overlap()


def _stripes(weights: Tensor, pairs: Tensor, wanted: Tensor) -> PatternScores:
    return Maps.counted(weights, pairs, wanted).stripes()
