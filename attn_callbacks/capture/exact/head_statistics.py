"""The statistics of every head over all rows, from a handful of fused calls."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from attn_callbacks.capture.answers import RowStatistic
from attn_callbacks.capture.call import AttentionCall
from attn_callbacks.capture.sampled import sampled_head_statistics
from attn_callbacks.capture.scores import wide
from attn_callbacks.functional.statistics import STATISTICS

__all__ = ["exact_head_statistics"]

_SMALL_BYTES = 16 * 2**20


def exact_head_statistics(call: AttentionCall, rows: Tensor | None, drawn: Tensor, long_range: float = 0.25) -> Tensor:
    """Compute :func:`~attn_callbacks.functional.head_statistics` over all rows without the weights.

    Costs about three forwards of the fused kernel if causal, else four, in ``O(queries * head_dim)`` memory and in
    float32. Matrices of up to 16 MB are made and read, which takes less time than many calls for little. Behind a
    FlexAttention ``score_mod`` the drawn rows stand in.

    Args:
        call: Any call.
        rows: Indices of the drawn queries ``(batch, rows)``; ``None``: all of them.
        drawn: ``True`` for the drawn rows that are real, ``(batch, rows)``.
        long_range: What counts as far away, as in ``head_statistics``.

    Shape:
        - output: ``(batch, heads, statistics)``, float32, along ``STATISTICS``; NaN where a statistic has no row

    Example:
        >>> from attn_callbacks.capture import AttentionCall
        >>> call = AttentionCall("attention", query=torch.zeros(1, 1, 4, 8), key=torch.zeros(1, 1, 4, 8))
        >>> values = exact_head_statistics(call, None, call.query_valid)[0, 0]
        >>> {name: round(value, 4) for name, value in zip(STATISTICS[:4], values.tolist())}
        {'entropy': 1.3863, 'entropy_normalised': 1.0, 'confidence': 0.25, 'distance': 1.25}
    """
    call = call.detach()
    if call.query is None or call.key is None or 4 * math.prod(call.shape) <= _SMALL_BYTES:
        return sampled_head_statistics(call, None, call.query_valid, long_range)  # all of the matrix
    if call.score_mod is not None:
        return sampled_head_statistics(call, rows, drawn, long_range)
    call = replace(call, query=wide(call.query), key=wide(call.key))
    answers = _row_statistics(call, long_range)
    values = {name: answer.mean().float() for name, answer in answers.items()}
    values["max_logit"] = _highest(answers["max_logit"])
    missing = torch.full(call.shape[:2], torch.nan, device=call.device)
    return torch.stack([values.get(name, missing) for name in STATISTICS], dim=-1)


def _row_statistics(call: AttentionCall, long_range: float) -> dict[str, RowStatistic]:
    """All of them for every row."""
    _, _, queries, keys = call.shape
    summary = call.summary(torch.arange(keys, device=call.device)[:, None])
    found = {
        "entropy": summary.entropy,
        "entropy_normalised": _normalised(summary.entropy, call.choices()),
        "confidence": summary.confidence,
        "first_mass": call.first_mass(),
        "max_logit": summary.max_logit,
    }
    if call.is_cross or queries != keys:
        return found
    position = RowStatistic(summary.expectation.values[..., 0], summary.expectation.counted)
    return found | {
        "distance": call.mean_distance(position),
        "long_range_mass": call.far_mass(_limit(call, long_range)),
        "self_mass": call.offset_mass(0),
        "previous_mass": call.offset_mass(-1),
        "next_mass": call.offset_mass(1),
    }


def _highest(logits: RowStatistic) -> Tensor:
    highest = logits.values.masked_fill(~logits.counted, -torch.inf).amax(dim=-1)
    return highest.masked_fill(highest == -torch.inf, torch.nan).float()


def _normalised(entropy: RowStatistic, choices: Tensor) -> RowStatistic:
    """Entropy over the logarithm of a row's choices; rows with a single one do not count."""
    return RowStatistic(entropy.values / choices.clamp_min(2).log(), entropy.counted & (choices > 1))


def _limit(call: AttentionCall, long_range: float) -> int | Tensor:
    """Largest distance that is not far; a number for all samples where that is known without looking at a mask."""
    if long_range >= 1:
        return int(long_range)
    if call.mask is None and call.mask_mod is None and call.given_key_valid is None:
        tokens = torch.tensor(float(min(call.shape[2:])))
        return int(long_range * tokens)
    return (long_range * call.key_valid.sum(dim=-1).float()).long()
