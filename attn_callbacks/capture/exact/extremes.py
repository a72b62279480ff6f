"""The largest score of every query. No average under attention tells it: scores are made, a few rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_callbacks.capture.exact.distribution import logsumexp
from attn_callbacks.capture.exact.problem import Problem, cached_rows

__all__ = ["confidence", "max_logit"]


def max_logit(problem: Problem) -> Tensor:
    """Largest score, ``(batch, heads, queries)``; ``-inf`` for a row without keys.

    The first half of attention in blocks that stay in the cache: no exponentials, and nothing of the second half.
    """
    key = problem.key.repeat_interleave(problem.query.shape[1] // problem.key.shape[1], dim=1).transpose(-2, -1)
    batch, heads, queries, _ = problem.query.shape
    step = cached_rows(batch * heads, problem.lengths[1])
    tops = [problem.query[:, :, :0, 0]]
    for start in range(0, queries, step):
        tops.append(problem.scores(key, start, min(start + step, queries)).amax(dim=-1))
    return torch.cat(tops, dim=2)


def confidence(problem: Problem) -> Tensor:
    """Largest weight, ``(batch, heads, queries)``; zero for a row without keys."""
    top = max_logit(problem)
    alive = top != -torch.inf
    return (top.where(alive, 0.0) - logsumexp(problem).where(alive, 0.0)).clamp(max=0.0).exp() * alive
