"""Statistics that describe what each attention head does, one value a sample."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_callbacks._checks import check_axes
from attn_callbacks.functional.entropy import row_entropy
from attn_callbacks.functional.rows import row_mean

__all__ = ["STATISTICS", "head_statistics"]

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

    Everything is computed in float32 without gradients, at a few passes over ``weights``.

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
    if not long_range > 0:
        raise ValueError(f"`long_range` must be above 0, got {long_range}.")
    weights = weights.detach().float()
    allowed = _allowed_pairs(weights, allowed, key_valid)
    valid = _valid_rows(weights, allowed, valid)
    tokens = _tokens(weights, allowed) if key_valid is None else key_valid.bool()
    values = _shape_values(weights, allowed, valid)
    values["first_mass"] = _mass_at(weights, allowed, valid, tokens.to(torch.uint8).argmax(dim=-1)[:, None])
    if square:
        queries = _query_positions(weights, positions)
        limit = long_range * tokens.sum(dim=-1).float() if long_range < 1 else weights.new_tensor([long_range])
        values.update(_position_values(weights, allowed, valid, queries, limit))
    if logits is not None:
        values["max_logit"] = _max_logit(weights, logits, allowed, valid)
    missing = weights.new_full(weights.shape[:2], torch.nan)
    return torch.stack([values.get(name, missing) for name in STATISTICS], dim=-1)


def _shape_values(weights: Tensor, allowed: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """Statistics of a row that know nothing of positions."""
    entropy = row_entropy(weights)  # (batch, heads, rows)
    choices = allowed.sum(dim=-1)
    several = choices > 1
    return {
        "entropy": row_mean(entropy, valid),
        "entropy_normalised": row_mean(entropy / choices.clamp_min(2).log(), valid & several),
        "confidence": row_mean(weights.amax(dim=-1), valid),
    }


def _position_values(
    weights: Tensor, allowed: Tensor, valid: Tensor, queries: Tensor, limit: Tensor
) -> dict[str, Tensor]:
    """Statistics that compare the row's position ``queries (batch or 1, rows)`` with those of the keys."""
    steps = (queries[..., None] - torch.arange(weights.shape[-1], device=weights.device)).abs().float()[:, None]
    values = {
        "distance": row_mean((weights * steps).sum(dim=-1), valid),
        "long_range_mass": row_mean((weights * (steps > limit[:, None, None, None]).float()).sum(dim=-1), valid),
    }
    for name, offset in (("self_mass", 0), ("previous_mass", -1), ("next_mass", 1)):
        values[name] = _mass_at(weights, allowed, valid, queries + offset)
    return values


def _mass_at(weights: Tensor, allowed: Tensor, valid: Tensor, key: Tensor) -> Tensor:
    """Mean weight on one key a row, ``key (batch or 1, rows or 1)``, over the rows that may attend to it."""
    batch, heads, rows, keys = weights.shape
    index = key.clamp(0, keys - 1)[:, None, :, None].expand(batch, heads, rows, 1)
    mass = weights.gather(-1, index)[..., 0]
    may = allowed.expand(batch, -1, rows, keys)
    exists = may.gather(-1, index[:, : may.shape[1]])[..., 0] & ((key >= 0) & (key < keys))[:, None]
    return row_mean(mass, valid & exists)


def _max_logit(weights: Tensor, logits: Tensor, allowed: Tensor, valid: Tensor) -> Tensor:
    if logits.shape != weights.shape:
        expected = tuple(weights.shape)
        raise ValueError(f"`logits` must have the shape of `weights` {expected}, got {tuple(logits.shape)}.")
    highest = logits.detach().float().where(allowed, -torch.inf).amax(dim=-1)  # (batch, heads, rows)
    highest = highest.where(valid, -torch.inf).amax(dim=-1)
    return highest.masked_fill(highest == -torch.inf, torch.nan)


def _allowed_pairs(weights: Tensor, allowed: Tensor | None, key_valid: Tensor | None) -> Tensor:
    """Return which pairs may attend as bool with four axes, broadcastable to ``weights`` except along keys."""
    batch, _, _, keys = weights.shape
    pairs = torch.ones(1, 1, 1, keys, dtype=torch.bool, device=weights.device)
    if allowed is not None:
        try:
            allowed.expand(weights.shape)
        except RuntimeError:
            raise ValueError(
                f"`allowed` must be broadcastable to `weights` {tuple(weights.shape)}, got {tuple(allowed.shape)}."
            ) from None
        pairs = pairs & allowed.bool()
    if key_valid is not None:
        if key_valid.shape != (batch, keys):
            raise ValueError(
                f"`key_valid` must have shape (batch, keys) = {(batch, keys)}, got {tuple(key_valid.shape)}."
            )
        pairs = pairs & key_valid.bool()[:, None, None]
    return pairs


def _valid_rows(weights: Tensor, allowed: Tensor, valid: Tensor | None) -> Tensor:
    """Return the rows that count ``(batch, heads, rows)``: wanted, with an allowed key and with weight on it."""
    attends = (weights.sum(dim=-1) != 0) & allowed.any(dim=-1)
    if valid is None:
        return attends
    batch, heads, rows, _ = weights.shape
    if valid.shape not in ((batch, rows), (batch, heads, rows)):
        raise ValueError(
            f"`valid` must have shape (batch, rows) = {(batch, rows)} or (batch, heads, rows) = "
            f"{(batch, heads, rows)}, got {tuple(valid.shape)}."
        )
    return attends & (valid if valid.dim() == 3 else valid[:, None]).bool()


def _tokens(weights: Tensor, allowed: Tensor) -> Tensor:
    """Return the keys that any row of a sample may attend to, ``(batch, keys)``."""
    return allowed.any(dim=2).any(dim=1).expand(weights.shape[0], -1)


def _query_positions(weights: Tensor, positions: Tensor | None) -> Tensor:
    """Return the query index of each row, ``(batch or 1, rows)``."""
    batch, _, rows, keys = weights.shape
    if positions is None:
        if rows != keys:
            raise ValueError(
                f"`positions` must say which query each row is when {rows} rows meet {keys} keys. "
                "For cross-attention pass `square=False`."
            )
        return torch.arange(rows, device=weights.device)[None]
    if positions.shape not in ((rows,), (batch, rows)):
        raise ValueError(
            f"`positions` must have shape (rows,) = {(rows,)} or (batch, rows) = {(batch, rows)}, "
            f"got {tuple(positions.shape)}."
        )
    return positions if positions.dim() == 2 else positions[None]
