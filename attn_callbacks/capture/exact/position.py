"""Where in the sequence a row of attention lies: moments of the position, distance, mass near and far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from attn_callbacks.capture.exact.blocks import in_blocks
from attn_callbacks.capture.exact.distribution import expectation, is_live, logsumexp
from attn_callbacks.capture.exact.problem import Problem
from attn_callbacks.capture.rows import rows_at_once

__all__ = ["far_mass", "mean_distance", "mean_position", "position_variance", "window_mass"]


def mean_position(problem: Problem) -> Tensor:
    """``sum_j p_ij j``, ``(batch, heads, queries)``."""
    return expectation(problem, _positions(problem))[..., 0]


def position_variance(problem: Problem) -> Tensor:
    """Variance of the attended position, ``(batch, heads, queries)``; in float64, in which squares of positions fit."""
    bias = None if problem.key_bias is None else problem.key_bias.double()
    double = replace(problem, query=problem.query.double(), key=problem.key.double(), key_bias=bias)
    position = _positions(double)
    first, second = expectation(double, torch.cat([position, position**2], dim=-1)).unbind(dim=-1)
    return (second - first**2).clamp_min(0.0).to(problem.query.dtype)


def mean_distance(problem: Problem, mean: Tensor | None = None) -> Tensor:
    r"""``sum_j p_ij |i - j|``, ``(batch, heads, queries)``; ``mean`` is the :func:`mean_position`, if known.

    Behind the query the distance is ``i - j``, a function of the key: one causal call. The sum of ``j - i`` in front of
    it follows from that over all keys:

    .. math:: \sum_j p_{ij} |i - j| = \sum_j p_{ij} (j - i) + 2 \sum_{j \le i} p_{ij} (i - j)
    """
    query = torch.arange(problem.lengths[0], device=problem.query.device)
    lse = problem.known_logsumexp
    if mean is None:
        mean, lse = _with_logsumexp(problem)
    signed = (query - mean) * (problem.choices() > 0)  # sum_j p_ij (i - j)
    if problem.is_causal:
        return signed
    behind = replace(problem, is_causal=True, known_logsumexp=None)
    position, part = _with_logsumexp(behind)
    share = _share(part, logsumexp(problem) if lse is None else lse)
    return (2.0 * share * (query - position) - signed).clamp_min(0.0)


def window_mass(problem: Problem, width: int) -> Tensor:
    """Weight on ``|i - j| <= width``, ``(batch, heads, queries)``: a band of scores, or all but the keys beyond."""
    if problem.pairs is None and 12 * width > problem.lengths[1]:
        lse = logsumexp(problem)
        return (1.0 - far_mass(problem, width)).where(lse != -torch.inf, 0.0).clamp(0.0, 1.0)
    return _mass_of_pairs(problem, lambda apart: apart.abs() <= width, reach=width)


def far_mass(problem: Problem, width: int | Tensor) -> Tensor:
    """Weight on ``|i - j| > width``, ``(batch, heads, queries)``.

    Queries moved by ``width + 1`` along the sequence attend causally to just the keys that lie farther behind them.

    Args:
        problem: Queries and keys of the same tokens.
        width: In tokens; ``(batch,)`` for a width of each sample.
    """
    if problem.pairs is not None:
        limit = width[:, None, None, None] if isinstance(width, Tensor) else width
        return _mass_of_pairs(problem, lambda apart: apart.abs() > limit, reach=problem.lengths[1])
    lse = logsumexp(problem)
    mass = _far_behind(problem, width, lse)
    if not problem.is_causal:
        mass = mass + _far_behind(problem.flipped(), width, lse.flip(2)).flip(2)
    return mass + 0.0 * lse.where(lse != -torch.inf, 0.0)  # a graph, and NaN, also for rows with nothing far away


def _with_logsumexp(problem: Problem) -> tuple[Tensor, Tensor]:
    """Mean position and log-sum-exp, from one call where no gradient is wanted."""
    if is_live(problem):
        return mean_position(problem), logsumexp(problem)
    output, lse = problem.attend(_positions(problem).expand(*problem.key.shape[:3], 1))
    return output[..., 0], lse


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """Share of a row's weight that a part of its keys has, from the log-sum-exps of both."""
    alive = part != -torch.inf
    return (part.where(alive, 0.0) - whole.where(alive, 0.0)).clamp(-80.0, 0.0).exp() * alive


def _far_behind(problem: Problem, width: int | Tensor, lse: Tensor) -> Tensor:
    """Weight on ``i - j > width``."""
    queries = problem.lengths[0]
    if isinstance(width, Tensor):
        moved = torch.arange(queries, device=lse.device) + width.to(lse.device)[:, None] + 1  # (batch, queries)
        return _far_behind_each(problem, moved, lse)
    start = width + 1
    if start >= queries:
        return torch.zeros_like(lse)
    bias = None if problem.key_bias is None else problem.key_bias[..., : queries - start]
    shifted = Problem(
        problem.query[:, :, start:], problem.key[:, :, : queries - start], problem.scale, True, key_bias=bias
    )
    share = _share(logsumexp(shifted), lse[:, :, start:])
    return torch.cat([torch.zeros_like(lse[:, :, :start]), share], dim=2)


def _far_behind_each(problem: Problem, moved: Tensor, lse: Tensor) -> Tensor:
    """The same with another shift for each sample: row ``r`` is query ``moved[:, r]``, which sees keys ``0..r``."""
    queries = problem.lengths[0]
    inside = (moved < queries)[:, None]
    index = moved.clamp(max=queries - 1)[:, None].expand(*lse.shape)
    query = problem.query.gather(2, index[..., None].expand_as(problem.query))
    shifted = replace(problem, query=query, is_causal=True, known_logsumexp=None)
    share = _share(logsumexp(shifted), lse.gather(2, index)) * inside
    back = (torch.arange(queries, device=lse.device) - (moved[:, :1])).expand(len(moved), -1)  # row of each query
    mass = share.gather(2, back.clamp(min=0)[:, None].expand(*lse.shape))
    return mass * (back >= 0)[:, None]


def _mass_of_pairs(problem: Problem, inside: Callable[[Tensor], Tensor], reach: int) -> Tensor:
    """Weight on the pairs whose offset ``i - j`` is ``inside``, of which none is larger than ``reach``, from scores."""
    queries, keys = problem.lengths
    lse = logsumexp(problem)
    group = problem.query.shape[1] // problem.key.shape[1]

    def mass(start: int, stop: int) -> tuple[Tensor]:
        first, last = max(0, start - reach), min(keys, stop + (0 if problem.is_causal else reach))
        own = problem.key[:, :, first:last].repeat_interleave(group, dim=1)
        scores = problem.scale * problem.query[:, :, start:stop] @ own.transpose(-2, -1)
        apart = torch.arange(start, stop, device=lse.device)[:, None] - torch.arange(first, last, device=lse.device)
        chosen = inside(apart) & ((apart >= 0) | (not problem.is_causal))
        if problem.key_bias is not None:
            scores = scores + problem.key_bias[..., first:last]
        if problem.pairs is not None:
            scores = scores + problem.pairs.read(start, stop)[..., first:last]
        rest = lse[:, :, start:stop, None]
        chosen = chosen & (scores != -torch.inf) & (rest != -torch.inf)
        # exp is tens of times slower where it underflows
        shares = (scores.where(chosen, 0.0) - rest.where(chosen, 0.0)).clamp(-80.0, 0.0).exp() * chosen
        return (shares.sum(dim=-1),)

    return in_blocks(queries, _band_rows(problem, min(reach, keys)), mass, is_live(problem), problem.tensors())[0]


def _band_rows(problem: Problem, reach: int) -> int:
    """Rows of one block of a band: as many as its width, within a few megabytes."""
    batch, heads = problem.query.shape[:2]
    wanted = max(64, min(reach, 256))
    step = rows_at_once(batch * heads, wanted + 2 * reach, wanted)
    if problem.pairs is None:
        return step
    return min(step, rows_at_once(problem.pairs.maps[0] * problem.pairs.maps[1], problem.lengths[1], wanted))


def _positions(problem: Problem) -> Tensor:
    return torch.arange(problem.lengths[1], device=problem.key.device, dtype=problem.key.dtype)[None, None, :, None]
