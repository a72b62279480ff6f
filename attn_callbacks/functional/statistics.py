"""Statistics that describe what each attention head does, one value a sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_callbacks._checks import check_axes
from attn_callbacks.functional._frame import Frame
from attn_callbacks.functional.entropy import row_entropy
from attn_callbacks.functional.rows import row_mean

__all__ = ["STATISTICS", "head_statistics", "logit_statistics", "weight_statistics"]

STATISTICS: tuple[str, ...] = (
    "entropy",
    "entropy_normalised",
    "confidence",
    "distance",
    "long_range_mass",
    "self_mass",
    "previous_mass",
    "next_mass",
    "first_mass",
    "max_logit",
)
"""Names along the last axis of `head_statistics`, in order."""

_MEANS = STATISTICS[:-1]  # means over rows; the last one, the largest logit, is a maximum


def head_statistics(
    weights: Tensor,
    logits: Tensor | None = None,
    *,
    positions: Tensor | None = None,
    allowed: Tensor | None = None,
    valid: Tensor | None = None,
    key_valid: Tensor | None = None,
    long_range: float = 0.25,
    square: bool = True,
) -> Tensor:
    """Describe every head on every sample by ten numbers, averaged over the sample's valid rows.

    | statistic | of a row ``i`` | range |
    |---|---|---|
    | ``entropy`` | ``-sum_j A[i, j] ln A[i, j]``, in nats | [0, ln keys] |
    | ``entropy_normalised`` | entropy over ln of the row's allowed keys; rows with one key left out | [0, 1] |
    | ``confidence`` | largest weight | [1 / keys, 1] |
    | ``distance`` | ``sum_j A[i, j] abs(i - j)``, in tokens | [0, keys - 1] |
    | ``long_range_mass`` | weight on keys farther away than ``long_range`` | [0, 1] |
    | ``self_mass`` | weight on the row's own position | [0, 1] |
    | ``previous_mass`` | weight on the position before | [0, 1] |
    | ``next_mass`` | weight on the position after | [0, 1] |
    | ``first_mass`` | weight on the sample's first valid key | [0, 1] |
    | ``max_logit`` | largest score of an allowed key before the softmax; the maximum over rows, not the mean | real |

    A row leaves the average of ``self_mass``, ``previous_mass``, ``next_mass`` and ``first_mass`` when that key does
    not exist for it: outside the sequence, padding, or disallowed. So ``next_mass`` is NaN under a causal mask given
    as ``allowed``. Positions count along the sequence; image patches are in raster order.

    Everything is computed in float32 without gradients, at about ten passes over ``weights``.

    Args:
        weights: Attention weights, each row summing to one; a row of zeros is invalid.
        logits: Scores before the softmax; ``None`` leaves ``max_logit`` NaN.
        positions: Query index of each row, for sampled rows; ``None`` means that row ``i`` is query ``i``.
        allowed: ``True`` where a row may attend; ``None`` allows every valid key.
        valid: ``True`` for the rows that count; padded queries are ``False``.
        key_valid: ``True`` for keys that are not padding. Needed for the exact first key and sequence length where
            ``allowed`` does not show them, as with a sliding window or sampled causal rows; ``None`` takes the keys
            that any given row may attend to.
        long_range: What counts as far away, a declared heuristic. Below 1, a share of the sample's valid keys: with
            the default of a quarter, uniform attention has a mass of about 0.56 (causal: 0.40) at every length. From 1
            on, a number of tokens. Farther means strictly farther.
        square: Whether queries and keys are the same tokens. ``False`` (cross-attention) leaves the statistics that
            compare positions NaN: distance, long range, self, previous and next.

    Shape:
        - weights, logits: ``(batch, heads, rows, keys)``
        - positions: ``(rows,)`` or ``(batch, rows)``
        - allowed: bool, broadcastable to ``weights``
        - valid: bool ``(batch, rows)`` or ``(batch, heads, rows)``
        - key_valid: bool ``(batch, keys)``
        - output: ``(batch, heads, statistics)``, float32, along `STATISTICS`; NaN where a statistic has no row

    Raises:
        ValueError: If a shape does not fit, if ``positions`` is missing for sampled rows, or ``long_range`` is not
            positive.

    Example:
        >>> weights = torch.tensor([[[[1.0, 0.0], [0.25, 0.75]]]])
        >>> values = head_statistics(weights, allowed=torch.ones(2, 2, dtype=torch.bool).tril())[0, 0]
        >>> {name: round(value, 4) for name, value in zip(STATISTICS[:4], values.tolist())}
        {'entropy': 0.2812, 'entropy_normalised': 0.8113, 'confidence': 0.875, 'distance': 0.125}

    References:
        Clark et al., "What Does BERT Look At?", 2019, section 3; Vig and Belinkov, "Analyzing the Structure of
        Attention in a Transformer Language Model", 2019, section 4; Voita et al., "Analyzing Multi-Head
        Self-Attention", 2019, section 4 (confidence); Xiao et al., "Efficient Streaming Language Models with
        Attention Sinks", 2023 (first token). ``long_range`` is ours.
    """
    check_axes("weights", weights, 4)
    return weight_statistics(weights, logits, Frame(positions, allowed, valid, key_valid, long_range, square))


def weight_statistics(weights: Tensor, logits: Tensor | None, frame: Frame) -> Tensor:
    """Do what `head_statistics` does, with its other arguments in one object."""
    weights = weights.detach().float()
    pairs = frame.pairs(weights)
    top = weights.new_full((1, 1, 1), torch.nan)
    if logits is not None:
        top = _top_logit(weights, logits, frame.allowed)
    attends = weights.sum(dim=-1) != 0
    return _averages(weights, row_entropy(weights), weights.amax(dim=-1), top, attends, pairs, frame)


def logit_statistics(logits: Tensor, frame: Frame) -> Tensor:
    """Compute `head_statistics` of the softmax of ``logits``, in fewer passes than the two take.

    The entropy of a softmax needs no logarithm of its weights: it is the log-sum-exp less the expected logit. It is
    rounded as the logits are, by about ``1e-7`` times the largest of them.

    Args:
        logits: Scores before the softmax, ``-inf`` (or far below all others) wherever ``frame.allowed`` is ``False``; a
            row of ``-inf`` alone is invalid.
        frame: The other arguments of `head_statistics`.

    Shape:
        - logits: ``(batch, heads, rows, keys)``
        - output: ``(batch, heads, statistics)``, float32, along `STATISTICS`; NaN where a statistic has no row

    Example:
        >>> logits = torch.tensor([[[[1.0, 0.0], [1.0, 9.0]]]]).log()
        >>> values = logit_statistics(logits, Frame(allowed=torch.ones(2, 2, dtype=torch.bool).tril()))[0, 0]
        >>> {name: round(value, 4) for name, value in zip(STATISTICS[:4], values.tolist())}
        {'entropy': 0.1625, 'entropy_normalised': 0.469, 'confidence': 0.95, 'distance': 0.05}
    """
    check_axes("logits", logits, 4)
    lowest = torch.finfo(torch.float32).min
    finite = logits.detach().float().clamp_min(lowest)  # 0 * -inf would be NaN
    top = finite.amax(dim=-1)
    weights = finite.softmax(dim=-1)
    highest = weights.amax(dim=-1)
    entropy = top - highest.log() - finite.mul_(weights).sum(dim=-1)  # log-sum-exp less expected logit
    return _averages(weights, entropy.clamp_min(0.0), highest, top, top != lowest, frame.pairs(weights), frame)


def _averages(
    weights: Tensor, entropy: Tensor, highest: Tensor, top: Tensor, attends: Tensor, pairs: Tensor, frame: Frame
) -> Tensor:
    """Average over the rows that count, all statistics in one go: for short rows the number of calls is the cost.

    ``entropy``, ``highest`` weight, ``top`` logit and ``attends``, whether there is any weight: one a row.
    """
    choices = pairs.sum(dim=-1, dtype=torch.int32)  # a third of the time of int64
    valid = attends & (choices > 0) & frame.wanted(weights)
    tokens = frame.tokens(pairs)
    queries = frame.queries(weights)
    rows = {
        "entropy": (entropy, valid),
        "entropy_normalised": (entropy / choices.clamp_min(2).float().log(), valid & (choices > 1)),
        "confidence": (highest, valid),
        **_masses(weights, pairs, valid, tokens.to(torch.uint8).argmax(dim=-1), queries),
    }
    if queries is not None:
        distance, far = _distances(weights, queries, frame.limit(tokens))
        rows |= {"distance": (distance, valid), "long_range_mass": (far, valid)}
    missing = (torch.zeros_like(entropy), torch.zeros_like(valid))
    values, counted = zip(*(rows.get(name, missing) for name in _MEANS), strict=True)
    means = row_mean(torch.stack(values, dim=-2), torch.stack(counted, dim=-2))  # over (batch, heads, statistics, rows)
    top = F.pad(top.where(valid, -torch.inf), (0, 1), value=-torch.inf).amax(dim=-1)  # also of no row at all
    return torch.cat([means, top.masked_fill(top == -torch.inf, torch.nan)[..., None]], dim=-1)


def _distances(weights: Tensor, queries: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """Mean distance of the keys from ``queries (batch or 1, rows)``, and weight beyond ``limit (batch or 1,)``."""
    keys = torch.arange(weights.shape[-1], dtype=torch.float32, device=weights.device)
    steps = (queries[:, None, :, None] - keys).abs_()  # (batch or 1, 1, rows, keys): small beside the weights
    far = (steps > limit[:, None, None, None]).float()
    return (weights * steps).sum(dim=-1), (weights * far).sum(dim=-1)


def _masses(
    weights: Tensor, pairs: Tensor, valid: Tensor, first: Tensor, queries: Tensor | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight on single keys of each row, and whether the row may attend to that key."""
    batch, heads, rows, keys = weights.shape
    wanted = {"first_mass": first[:, None].expand(batch, rows)}
    if queries is not None:
        queries = queries.expand(batch, rows)
        wanted |= {"self_mass": queries, "previous_mass": queries - 1, "next_mass": queries + 1}
    key = torch.stack(list(wanted.values()), dim=-1)[:, None]  # (batch, 1, rows, statistics)
    inside = key.clamp(0, keys - 1)
    index = inside.expand(-1, heads, -1, -1)
    may = pairs.expand(batch, -1, rows, keys)
    exists = may.gather(-1, index[:, : may.shape[1]]) & (key == inside) & valid[..., None]
    mass = weights.gather(-1, index)
    return dict(zip(wanted, zip(mass.unbind(dim=-1), exists.unbind(dim=-1), strict=True), strict=True))


def _top_logit(weights: Tensor, logits: Tensor, allowed: Tensor | None) -> Tensor:
    """Largest logit of every row ``(batch, heads, rows)``, among the ``allowed`` pairs (``None``: all)."""
    if logits.shape != weights.shape:
        expected = tuple(weights.shape)
        raise ValueError(f"`logits` must have the shape of `weights` {expected}, got {tuple(logits.shape)}.")
    logits = logits.detach().float()
    if allowed is None:
        return logits.amax(dim=-1)
    # a minimum is six times faster than `where` on all pairs
    ceiling = torch.where(allowed.bool(), logits.new_full((), torch.inf), -torch.inf)
    return torch.minimum(logits, ceiling).amax(dim=-1)
