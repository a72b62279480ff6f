"""Statistics that describe what each attention head does, one value a sample."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_callbacks._checks import check_axes
from attn_callbacks.functional._frame import Frame, frame_of
from attn_callbacks.functional.entropy import row_entropy
from attn_callbacks.functional.rows import row_mean

__all__ = ["STATISTICS", "head_statistics", "logit_statistics"]

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
    | ``max_logit`` | largest score before the softmax; the maximum over rows, not the mean | real |

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
    weights = weights.detach().float()
    frame = frame_of(
        weights,
        weights.sum(dim=-1) != 0,
        positions=positions,
        allowed=allowed,
        valid=valid,
        key_valid=key_valid,
        long_range=long_range,
        square=square,
    )
    if logits is None:
        top = weights.new_full((1, 1, 1), torch.nan)
    else:
        top = _top_logit(weights, logits, None if allowed is None and key_valid is None else frame.allowed)
    return _averages(weights, row_entropy(weights), weights.amax(dim=-1), top, frame)


def logit_statistics(
    logits: Tensor,
    *,
    positions: Tensor | None = None,
    allowed: Tensor | None = None,
    valid: Tensor | None = None,
    key_valid: Tensor | None = None,
    long_range: float = 0.25,
    square: bool = True,
) -> Tensor:
    """Compute `head_statistics` of the softmax of ``logits``, at half the cost of the two calls.

    The entropy of a softmax needs no logarithm of its weights: it is the log-sum-exp less the expected logit. It comes
    with the rounding of float32 logits, about ``1e-7`` times the largest of them.

    Args:
        logits: Scores before the softmax, ``-inf`` (or far below all others) wherever ``allowed`` is ``False``; a row
            of ``-inf`` alone is invalid. Stays as it is.
        positions: This and all that follows are as in `head_statistics`.

    Shape:
        - logits: ``(batch, heads, rows, keys)``
        - output: ``(batch, heads, statistics)``, float32, along `STATISTICS`; NaN where a statistic has no row

    Raises:
        ValueError: As `head_statistics`.

    Example:
        >>> logits = torch.tensor([[[[1.0, 0.0], [1.0, 9.0]]]]).log()
        >>> values = logit_statistics(logits, allowed=torch.ones(2, 2, dtype=torch.bool).tril())[0, 0]
        >>> {name: round(value, 4) for name, value in zip(STATISTICS[:4], values.tolist())}
        {'entropy': 0.1625, 'entropy_normalised': 0.469, 'confidence': 0.95, 'distance': 0.05}
    """
    check_axes("logits", logits, 4)
    lowest = torch.finfo(torch.float32).min
    finite = logits.detach().float().clamp_min(lowest)  # 0 * -inf would be NaN
    top = finite.amax(dim=-1)
    weights = finite.softmax(dim=-1)
    highest = weights.amax(dim=-1)
    log_sum = top - highest.log()
    # The sum of the weights is one but for rounding, which a large log-sum-exp would multiply.
    entropy = (weights.sum(dim=-1) * log_sum - finite.mul_(weights).sum(dim=-1)).clamp_min(0.0)
    frame = frame_of(
        weights,
        top != lowest,
        positions=positions,
        allowed=allowed,
        valid=valid,
        key_valid=key_valid,
        long_range=long_range,
        square=square,
    )
    return _averages(weights, entropy, highest, top, frame)


def _averages(weights: Tensor, entropy: Tensor, highest: Tensor, top: Tensor, frame: Frame) -> Tensor:
    """Average the statistics of the rows that have them; ``entropy``, ``highest``, ``top``: ``(batch, heads, rows)``.

    All statistics go through one reduction: on small rows the number of calls is what costs.
    """
    normalised = entropy / frame.choices.clamp_min(2).log()
    rows = {
        "entropy": (entropy, frame.valid),
        "entropy_normalised": (normalised, frame.valid & (frame.choices > 1)),
        "confidence": (highest, frame.valid),
        **_masses(weights, frame),
        **_distances(weights, frame),
    }
    missing = (torch.zeros_like(entropy), torch.zeros_like(frame.valid))
    values, counted = (torch.stack(parts, dim=-2) for parts in zip(*(rows.get(name, missing) for name in _MEANS)))
    top = top.masked_fill(~frame.valid, -torch.inf).amax(dim=-1)
    top = top.masked_fill(top == -torch.inf, torch.nan)
    return torch.cat([row_mean(values, counted), top[..., None]], dim=-1)


def _distances(weights: Tensor, frame: Frame) -> dict[str, tuple[Tensor, Tensor]]:
    """Statistics of how far a row looks."""
    if frame.queries is None:
        return {}
    keys = torch.arange(weights.shape[-1], dtype=torch.float32, device=weights.device)
    steps = (frame.queries[:, None, :, None] - keys).abs_()  # (batch or 1, 1, rows, keys): small beside the weights
    far = (steps > frame.limit[:, None, None, None]).float()
    return {
        "distance": ((weights * steps).sum(dim=-1), frame.valid),
        "long_range_mass": ((weights * far).sum(dim=-1), frame.valid),
    }


def _masses(weights: Tensor, frame: Frame) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight on single keys of each row, which counts where the row may attend to that key."""
    batch, heads, rows, keys = weights.shape
    wanted = {"first_mass": frame.first[:, None].expand(-1, rows)}
    if frame.queries is not None:
        queries = frame.queries.expand(batch, -1)
        wanted |= {"self_mass": queries, "previous_mass": queries - 1, "next_mass": queries + 1}
    key = torch.stack(list(wanted.values()), dim=-1)[:, None]  # (batch, 1, rows, statistics)
    index = key.clamp(0, keys - 1).expand(-1, heads, -1, -1)
    may = frame.allowed.expand(batch, -1, rows, keys)
    exists = may.gather(-1, index[:, : may.shape[1]]) & (key == key.clamp(0, keys - 1)) & frame.valid[..., None]
    mass = weights.gather(-1, index).unbind(dim=-1)
    return dict(zip(wanted, zip(mass, exists.unbind(dim=-1), strict=True), strict=True))


def _top_logit(weights: Tensor, logits: Tensor, allowed: Tensor | None) -> Tensor:
    """Largest logit of every row ``(batch, heads, rows)``."""
    if logits.shape != weights.shape:
        expected = tuple(weights.shape)
        raise ValueError(f"`logits` must have the shape of `weights` {expected}, got {tuple(logits.shape)}.")
    logits = logits.detach().float()
    return (logits if allowed is None else logits.where(allowed, -torch.inf)).amax(dim=-1)
