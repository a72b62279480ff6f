"""Many statistics from one pass over the scores, in blocks of queries that stay in the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_callbacks.capture.exact.problem import Problem, cached_rows

__all__ = ["survey"]


def survey(problem: Problem, features: Tensor, counted: Tensor) -> tuple[Tensor, ...]:
    """Entropy, largest weight, largest score, log-sum-exp, expectation of features and received mass.

    Takes about the time of one call of a kernel, on a processor whose cache holds a block. Has no gradient.

    Args:
        problem: Any.
        features: ``(batch | 1, heads | 1, keys, width)``
        counted: ``True`` for the queries that count, ``(batch, heads | 1, queries)``.

    Shape:
        - output: four of ``(batch, heads, queries)``, ``(batch, heads, queries, width)`` and ``(batch, heads, keys)``
    """
    batch, heads, queries, _ = problem.query.shape
    keys = problem.lengths[1]
    columns = problem.key.repeat_interleave(heads // problem.key.shape[1], dim=1).transpose(-2, -1).contiguous()
    features = features.to(problem.key.dtype)
    rows = problem.query.new_empty(4, batch, heads, queries)
    expected = problem.query.new_empty(batch, heads, queries, features.shape[-1])
    received = problem.query.new_zeros(batch, heads, keys)
    step = cached_rows(batch * heads, keys)
    for start in range(0, queries, step):
        own = slice(start, min(start + step, queries))
        scores = problem.scores(columns, own.start, own.stop)
        seen = scores.shape[-1]
        top = scores.amax(dim=-1, keepdim=True)
        alive = top != -torch.inf
        # exp is tens of times slower where it underflows
        weights = scores.sub_(top.where(alive, 0.0)).clamp_(min=-80.0).exp()
        total = weights.sum(dim=-1)
        rows[0, :, :, own] = total.log() - scores.mul_(weights).sum(dim=-1) / total
        rows[1, :, :, own] = 1.0 / total
        rows[2, :, :, own] = top[..., 0]
        rows[3, :, :, own] = total.log() + top[..., 0]
        expected[:, :, own] = weights @ features[..., :seen, :] / total[..., None]
        share = (counted[:, :, own] & alive[..., 0]) / total
        received[..., :seen] += (share[..., None, :] @ weights)[..., 0, :]
    return (*rows.unbind(), expected, received)
