"""What a key gets: the mass it receives from all queries, and the map pooled over parts of both sequences."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_callbacks.capture.exact.distribution import expectation, logsumexp
from attn_callbacks.capture.exact.problem import Problem

__all__ = ["bucketed_weights", "received_mass"]


def received_mass(problem: Problem, counted: Tensor) -> Tensor:
    r"""``sum_i p_ij`` over the queries that count, ``(batch, heads, keys)``: one call with the roles swapped.

    .. math:: c_j = \sum_i \exp(s_{ij} - lse_i) = \exp \, LSE_i (s_{ij} - lse_i)

    Args:
        problem: Any.
        counted: ``True`` for the queries that count, ``(batch, heads | 1, queries)``.
    """
    turns_causal = problem.is_causal and problem.pairs is None
    square = _cut_to_square(problem) if turns_causal else problem
    lse = logsumexp(problem)
    counts = counted & (lse != -torch.inf)
    gone = (-lse.where(counts, 0.0)).masked_fill(~counts, -torch.inf)
    received = logsumexp(square.transposed(gone))
    received = received.flip(2) if turns_causal else received
    if square.key_bias is not None:
        received = received + square.key_bias[:, :, 0]  # a constant of the swapped rows
    alive = received != -torch.inf
    mass = received.where(alive, 0.0).exp() * alive
    return F.pad(mass, (0, problem.lengths[1] - mass.shape[2]))  # negative: what was added goes again


def bucketed_weights(problem: Problem, counted: Tensor, parts: tuple[int, int]) -> Tensor:
    """Mean over the queries of each part, sum over the keys of each part, ``(batch, heads, *parts)``.

    One call with indicators of the key parts in the value slot.
    """
    queries, keys = problem.lengths
    columns = torch.arange(keys, device=counted.device) * parts[1] // keys
    rows = torch.arange(queries, device=counted.device) * parts[0] // queries
    pooled = expectation(problem, F.one_hot(columns, parts[1]).to(problem.key.dtype)[None, None])
    pooled = pooled * counted[..., None]
    total = pooled.new_zeros(*pooled.shape[:2], *parts).index_add(2, rows, pooled)
    count = pooled.new_zeros(*counted.shape[:2], parts[0]).index_add(2, rows, counted.to(pooled.dtype))
    return total / count.clamp_min(1.0)[..., None]


def _cut_to_square(problem: Problem) -> Problem:
    """Cut or fill up the keys to as many as there are queries: those behind the last query are never attended."""
    queries, keys = problem.lengths
    if queries == keys:
        return problem
    bias = None if problem.key_bias is None else F.pad(problem.key_bias, (0, queries - keys))
    key = F.pad(problem.key, (0, 0, 0, queries - keys))
    return Problem(problem.query, key, problem.scale, is_causal=True, key_bias=bias)
