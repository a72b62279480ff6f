"""Bring a recorded call into the form that kernels take; say when it has none."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attn_callbacks.capture import flex
from attn_callbacks.capture.exact.pairs import PairMask, masked_pairs, separated
from attn_callbacks.capture.exact.problem import Problem
from attn_callbacks.capture.rows import rows_at_once
from attn_callbacks.capture.scores import let_through, wide

if TYPE_CHECKING:
    from attn_callbacks.capture.call import AttentionCall

__all__ = ["read_problem", "with_separated_bias"]

_LARGE = 2**20  # entries of a mask from which on it pays to look for a simpler form


def read_problem(call: AttentionCall, keeps_half: bool = False) -> Problem | None:
    """Return what a kernel needs to compute the attention of ``call``, without a matrix of queries x keys.

    Args:
        call: Any call.
        keeps_half: Leave float16 and bfloat16 as they are on a GPU, whose fast kernels take nothing else.

    Returns:
        ``None`` where no kernel can: the matrix is all there is, a function of each score comes in between, or the
        additive mask is being learned, for which no fused kernel has a gradient.
    """
    mask = call.mask
    learned = mask is not None and mask.requires_grad and torch.is_grad_enabled()
    if call.query is None or call.key is None or call.score_mod is not None or learned:
        return None
    batch, heads, _, keys = call.shape
    stays = keeps_half and call.query.is_cuda
    query, key = (tensor if stays else wide(tensor) for tensor in (call.query, call.key))
    query, key = query.expand(batch, heads, -1, -1), key.expand(batch, -1, -1, -1)
    scale = 1.0 / math.sqrt(query.shape[-1]) if call.scale is None else call.scale
    if scale <= 0:  # kernels multiply their -inf with it
        query, scale = query * scale, 1.0
    problem = Problem(query, key, scale, call.is_causal)
    if call.mask_mod is not None:
        return replace(problem, pairs=_function_pairs(call, query.dtype))
    if mask is None:
        return problem
    mask = mask.expand(*mask.shape[:3], keys)
    if mask.shape[2] == 1:
        return replace(problem, key_bias=_additive(mask, query.dtype))
    return _simplified(problem, mask) or replace(
        problem,
        pairs=masked_pairs(mask, lambda block: _additive(block, query.dtype)),
    )


def with_separated_bias(problem: Problem) -> Problem | None:
    """Find out the expected bias of a row, which the entropy needs; ``None`` where it is no expectation of a key."""
    if problem.pairs is None or not problem.pairs.has_bias:
        return problem
    parts = separated(problem.pairs, *problem.lengths)
    return None if parts is None else replace(problem, separated=parts)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What a mask adds to the scores, ``-inf`` where it forbids."""
    values = mask.to(dtype) if mask.is_floating_point() else torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return values.masked_fill(~let_through(mask, None), -math.inf)


def _simplified(problem: Problem, mask: Tensor) -> Problem | None:
    """Recognise a large mask that says no more than which keys are padding and whether attention is causal.

    Hugging Face models write that out in full, as booleans or as zeros and very negative numbers. Kernels do half the
    work when they are told.
    """
    if mask[0, 0].numel() < _LARGE:
        return None
    queries, keys = problem.lengths
    step = rows_at_once(mask.shape[0] * mask.shape[1], keys, queries)
    starts = range(0, queries, step)
    key_allowed = torch.stack([let_through(mask[:, :, i : i + step], None).any(dim=2) for i in starts])
    key_allowed = key_allowed.any(dim=0)[:, :, None]
    position = torch.arange(keys, device=mask.device)
    fits = torch.ones(2, dtype=torch.bool, device=mask.device)  # without a diagonal of its own, and with one
    for i in starts:
        block = mask[:, :, i : i + step]
        allowed = let_through(block, None)
        past = position <= torch.arange(i, i + block.shape[2], device=mask.device)[:, None]
        seen = allowed & past
        both = torch.stack([(allowed == key_allowed).all(), (allowed == (key_allowed & past)).all()])
        if problem.is_causal:  # what lies in the future does not matter
            both = (seen == (key_allowed & past)).all().expand(2)
        plain = True if mask.dtype == torch.bool else (block.where(allowed, 0.0) == 0).all()
        fits = fits & both & plain
    without, with_diagonal = fits.tolist()
    if not (without or with_diagonal):
        return None
    is_causal = problem.is_causal or not without
    return replace(problem, is_causal=is_causal, key_bias=_additive(key_allowed, problem.query.dtype))


def _function_pairs(call: AttentionCall, dtype: torch.dtype) -> PairMask:
    """Evaluate FlexAttention's mask function for a block of queries, or of keys, at a time."""
    mask_mod, shape, device = call.mask_mod, call.shape, call.device
    assert mask_mod is not None  # noqa: S101
    batch, heads, queries, keys = shape

    def read(start: int, stop: int) -> Tensor:
        rows = torch.arange(start, stop, device=device)
        return _additive(flex.allowed(mask_mod, shape, rows, device), dtype)

    def read_keys(start: int, stop: int) -> Tensor:
        rows = torch.arange(start, stop, device=device)
        swapped = flex.allowed(lambda b, h, k, q: mask_mod(b, h, q, k), (batch, heads, keys, queries), rows, device)
        return _additive(swapped, dtype)

    return PairMask(read, read_keys, (batch, heads), has_bias=False)
