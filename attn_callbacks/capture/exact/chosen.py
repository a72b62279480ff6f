"""The weight of every query on a few keys of its own choice: sinks, the previous token, any offset."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_callbacks.capture.exact.distribution import logsumexp
from attn_callbacks.capture.exact.pairs import PairMask
from attn_callbacks.capture.exact.problem import Problem
from attn_callbacks.capture.rows import rows_at_once

__all__ = ["mass_on_keys"]

_AT_ONCE = 8  # keys a query


def mass_on_keys(problem: Problem, keys: Tensor, exists: Tensor) -> tuple[Tensor, Tensor]:
    """Add up the weight of every query on keys of its own choice, and say whether it may attend to any of them.

    Args:
        problem: Any.
        keys: Indices ``(batch | 1, queries | 1, n)``.
        exists: ``True`` for the indices that count, like ``keys``.

    Shape:
        - output: two of ``(batch, heads, queries)``
    """
    lse = logsumexp(problem)
    mass, sees = torch.zeros_like(lse), torch.zeros_like(lse, dtype=torch.bool)
    for own, real in zip(keys.split(_AT_ONCE, dim=-1), exists.split(_AT_ONCE, dim=-1), strict=True):
        allowed = (_may_see(problem, own) & real[:, None]).expand(*lse.shape, -1)
        mass = mass + _weights(problem, own, allowed, lse).sum(dim=-1)
        sees = sees | allowed.any(dim=-1)
    return mass, sees


def _weights(problem: Problem, keys: Tensor, allowed: Tensor, lse: Tensor) -> Tensor:
    """Weight on each of the keys, ``(batch, heads, queries, n)``."""
    chosen = _taken(problem.key, keys)  # (batch, key_heads, queries | 1, n, head_dim)
    query = problem.query.unflatten(1, (chosen.shape[1], -1))  # (batch, key_heads, group, queries, head_dim)
    equation = "bghqd,bgqnd->bghqn" if keys.shape[1] > 1 else "bghqd,bgond->bghqn"
    scores = (problem.scale * torch.einsum(equation, query, chosen)).flatten(1, 2)
    if problem.key_bias is not None:
        scores = scores + _taken(problem.key_bias.transpose(-2, -1), keys)[..., 0]
    if problem.pairs is not None:
        scores = scores + _taken_pairs(problem, problem.pairs, keys)
    alive = allowed & (lse[..., None] != -torch.inf)
    shares = scores.where(alive, 0.0) - lse[..., None].where(alive, 0.0)
    weights: Tensor = shares.clamp(-80.0, 0.0).exp() * alive  # exp is slow where it underflows
    return weights


def _may_see(problem: Problem, keys: Tensor) -> Tensor:
    """Where queries may attend to their keys: bool ``(batch | 1, heads | 1, queries, n)``."""
    queries = problem.lengths[0]
    seen = torch.ones(1, 1, queries, 1, dtype=torch.bool, device=keys.device)
    if problem.is_causal:
        seen = seen & (keys <= torch.arange(queries, device=keys.device)[:, None])[:, None]
    if problem.key_bias is not None:
        seen = seen & (_taken(problem.key_bias.transpose(-2, -1), keys)[..., 0] > -torch.inf)
    if problem.pairs is not None:
        seen = seen & (_taken_pairs(problem, problem.pairs, keys) > -torch.inf)
    return seen


def _taken(tensor: Tensor, keys: Tensor) -> Tensor:
    """Take ``keys (batch | 1, queries | 1, n)`` of a tensor ``(batch | 1, heads, keys, width)``.

    Returns ``(batch | 1, heads, queries | 1, n, width)``.
    """
    (batch,) = torch.broadcast_shapes(tensor.shape[:1], keys.shape[:1])
    rows, chosen = keys.shape[1:]
    index = keys.reshape(len(keys), 1, rows * chosen, 1).expand(batch, tensor.shape[1], -1, tensor.shape[-1])
    taken: Tensor = tensor.expand(batch, -1, -1, -1).gather(2, index).unflatten(2, (rows, chosen))
    return taken


def _taken_pairs(problem: Problem, pairs: PairMask, keys: Tensor) -> Tensor:
    """Additive mask of every query on its chosen keys, ``(batch, heads | 1, queries, n)``."""
    queries, length = problem.lengths
    found = []
    step = rows_at_once(pairs.maps[0] * pairs.maps[1], length, queries)
    for start in range(0, queries, step):
        block = pairs.read(start, min(start + step, queries))
        own = keys if keys.shape[1] == 1 else keys[:, start : start + block.shape[2]]
        (batch,) = torch.broadcast_shapes(block.shape[:1], own.shape[:1])
        index = own[:, None].expand(batch, block.shape[1], block.shape[2], -1)
        found.append(block.expand(batch, -1, -1, -1).gather(-1, index))
    return torch.cat(found, dim=2)
