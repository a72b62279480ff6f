"""What a row of attention is like as a distribution: log-sum-exp, expectations, entropies."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attn_callbacks.capture.exact.problem import Problem
from attn_callbacks.capture.scores import wide

__all__ = ["entropy_and_expectation", "expectation", "is_live", "logsumexp", "renyi_entropy"]


def logsumexp(problem: Problem) -> Tensor:
    """Log-sum-exp of the scores ``(batch, heads, queries)``, ``-inf`` for a row without keys; differentiable.

    No kernel differentiates its log-sum-exp. But ``d lse = sum_j p_j d s_j``: the gradient is that of the expected
    score under weights that are held fixed, which is linear in the value slot.
    """
    if not is_live(problem):
        known = problem.known_logsumexp
        return problem.attend(problem.key)[1] if known is None else known
    values = [problem.key] if problem.key_bias is None else [problem.key, _column(problem.key_bias)]
    own = _per_key_head(problem, values[-1])
    output, value = own.detached().attend(_side_by_side(own, *values))
    width = problem.key.shape[-1]
    output, query = wide(output), wide(problem.query)
    score = problem.scale * (query * output[..., :width]).sum(dim=-1) + output[..., width:].sum(dim=-1)
    return value + score - score.detach()


def expectation(problem: Problem, features: Tensor) -> Tensor:
    """``sum_j p_ij features_j``, ``(batch, heads, queries, width)``; zeros for a row without keys.

    ``features`` has axes ``(batch | 1, heads | 1, keys, width)``.
    """
    if features.shape[-1] == 0:
        return problem.query.new_zeros(*problem.query.shape[:3], 0)
    own = _per_key_head(problem, features)
    return own.attend(_side_by_side(own, features.to(own.key.dtype)))[0]


def entropy_and_expectation(problem: Problem, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Entropy, the expectation of ``features``, and the log-sum-exp without a graph, from one call.

    .. math:: H_i = lse_i - \sum_j p_{ij} s_{ij}, \quad
        \sum_j p_{ij} s_{ij} = scale \, q_i \cdot \sum_j p_{ij} k_j + \sum_j p_{ij} b_{ij}

    The keys themselves go into the value slot. Differentiable: :math:`d H = -\sum_j s_j d p_j`, since what the scores
    contribute directly cancels, so queries and keys outside of the weights are held fixed.

    A bias in ``pairs`` has to be ``separated``.
    """
    biases = [] if problem.key_bias is None else [_column(problem.key_bias).detach()]
    constant: Tensor | float = 0.0
    if problem.separated is not None:
        constant = problem.separated[0]
        biases.append(problem.separated[1][..., None].to(problem.key.dtype))
    own = problem
    for columns in (*biases, features):
        own = _per_key_head(own, columns)
    output, lse = own.attend(_side_by_side(own, own.key.detach(), *biases, features.to(own.key.dtype)))
    width, last = own.key.shape[-1], own.key.shape[-1] + len(biases)
    output = wide(output)  # products of half precision would lose what the kernel has kept
    score = own.scale * (wide(own.query).detach() * output[..., :width]).sum(dim=-1) + constant
    score = score + output[..., width:last].sum(dim=-1)
    entropy = (lse - score).where(lse != -torch.inf, 0.0).clamp_min(0.0)
    return entropy, output[..., last:], lse


def renyi_entropy(problem: Problem, order: float) -> Tensor:
    r""":math:`\frac{1}{1 - a} \log \sum_j p_{ij}^a`, from the log-sum-exps at two scales."""
    lse = logsumexp(problem)
    value = (logsumexp(problem.scaled(order)) - order * lse) / (1.0 - order)
    return value.where(lse != -torch.inf, 0.0)


def is_live(problem: Problem) -> bool:
    """A gradient is wanted of the scores."""
    tensors = (problem.query, problem.key, problem.key_bias)
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _side_by_side(problem: Problem, *values: Tensor) -> Tensor:
    """Join columns ``(batch | 1, heads | 1, keys, width)`` for the value slot."""
    shape = problem.key.shape[:3]
    given = [value for value in values if value.shape[-1] > 0]
    if len(given) == 1 and given[0].shape[:3] == shape:
        return given[0]
    return torch.cat([_for_heads(value, shape[1]).expand(*shape, -1) for value in given], dim=-1)


def _for_heads(value: Tensor, heads: int) -> Tensor:
    """Repeat what belongs to key heads for the query heads that read them."""
    return value if value.shape[1] in (1, heads) else value.repeat_interleave(heads // value.shape[1], dim=1)


def _per_key_head(problem: Problem, columns: Tensor) -> Problem:
    """Repeat grouped keys where ``columns (batch | 1, heads | 1, ...)`` tell the heads of a group apart."""
    group = problem.query.shape[1] // problem.key.shape[1]
    if group == 1 or columns.shape[1] == 1:
        return problem
    return replace(problem, key=problem.key.repeat_interleave(group, dim=1))


def _column(bias: Tensor) -> Tensor:
    """Turn a bias of keys ``(..., 1, keys)`` into a column ``(..., keys, 1)``, finite where nobody may attend."""
    return bias.where(bias > -torch.inf, 0.0).transpose(-2, -1)
