"""Calls of every kind, each with its scores and open pairs as numpy arrays."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from attn_callbacks.capture import AttentionCall
from tests.functional import reference

BATCH, HEADS, TOKENS, WIDTH = 2, 4, 9, 8
INDEX = np.arange(TOKENS)
LENGTHS = np.array([TOKENS, 6])
PADDING = np.broadcast_to((LENGTHS[:, None] > INDEX)[:, None, None], (BATCH, 1, TOKENS, TOKENS))
LEFT = (TOKENS - LENGTHS[:, None] <= INDEX)[:, None, None]
CAUSAL = INDEX[:, None] >= INDEX
WINDOW = CAUSAL & (INDEX[:, None] - INDEX < 3)
HOLES = np.random.default_rng(1).random((BATCH, HEADS, TOKENS, TOKENS)) > 0.5
HOLES[0, :, 4] = HOLES[1, 2, 7] = False  # rows without keys, in all heads and in one
SLOPES = 2.0 ** -np.arange(1, HEADS + 1)
ALIBI = -SLOPES[:, None, None] * np.abs(INDEX[:, None] - INDEX)
LEARNED = np.random.default_rng(2).standard_normal((1, HEADS, TOKENS, TOKENS))
ALL = np.ones((1, 1, 1, TOKENS), dtype=bool)


class Case(NamedTuple):
    """A call, and its scores and open pairs as numpy arrays."""

    call: AttentionCall
    scores: np.ndarray
    allowed: np.ndarray


def boolean(pairs: np.ndarray) -> Tensor:
    return torch.tensor(pairs.reshape((1,) * (4 - pairs.ndim) + pairs.shape))


def additive(pairs: np.ndarray, bias: np.ndarray | float = 0.0, closed: float = -math.inf) -> Tensor:
    filled = np.where(pairs, bias, closed)
    return torch.tensor(filled.reshape((1,) * (4 - filled.ndim) + filled.shape)).float()


def fused(
    allowed: np.ndarray = ALL,
    bias: np.ndarray | float = 0.0,
    keys: int = TOKENS,
    key_heads: int = HEADS,
    dtype: torch.dtype = torch.float32,
    size: float = 1.0,
    **options: object,
) -> Case:
    query = (size * torch.randn(BATCH, HEADS, TOKENS, WIDTH)).to(dtype)
    key = torch.randn(BATCH, key_heads, keys, WIDTH).to(dtype)
    call = AttentionCall("a", query=query, key=key, enable_gqa=key_heads != HEADS, **options)
    wide = key.double().numpy().repeat(HEADS // key_heads, axis=1)
    scale = WIDTH**-0.5 if call.scale is None else call.scale
    scores = query.double().numpy() @ np.swapaxes(wide, -2, -1) * scale + bias
    return Case(call, scores, allowed)


def given(name: str, allowed: np.ndarray = ALL) -> Case:
    logits = np.where(allowed, 2 * np.random.default_rng(3).standard_normal((BATCH, HEADS, TOKENS, TOKENS)), -math.inf)
    if name == "scores":
        return Case(AttentionCall("a", scores=torch.tensor(logits).float()), logits, allowed)
    weights = reference.softmax_rows(logits, np.isfinite(logits))
    return Case(AttentionCall("a", recorded=torch.tensor(weights).float()), logits, allowed)


def flexible(pairs: np.ndarray = ALL, **options: object) -> Case:
    opened = torch.tensor(np.broadcast_to(pairs, (BATCH, HEADS, TOKENS, TOKENS)).copy())
    return fused(pairs, mask_mod=lambda b, h, q, k: opened[b, h, q, k], **options)


def capped() -> Case:
    case = fused(score_mod=lambda score, b, h, q, k: torch.where(q >= k, 2.0 * torch.tanh(score / 2.0), -math.inf))
    return case._replace(scores=np.where(CAUSAL, 2 * np.tanh(case.scores / 2), -math.inf))


CASES = {
    "plain": lambda: fused(),
    "scale": lambda: fused(scale=0.9),
    "large scores": lambda: fused(size=12.0),
    "causal": lambda: fused(CAUSAL, is_causal=True),
    "boolean padding": lambda: fused(PADDING, mask=boolean(PADDING)),
    "float padding": lambda: fused(PADDING, mask=additive(PADDING[:, :, :1])),
    "minimum": lambda: fused(PADDING, mask=additive(PADDING, closed=torch.finfo(torch.float32).min)),
    "left padding, causal": lambda: fused(LEFT & CAUSAL, mask=boolean(LEFT & CAUSAL)),
    "left padding, is_causal": lambda: fused(LEFT & CAUSAL, mask=additive(LEFT), is_causal=True),
    "window": lambda: fused(WINDOW, mask=boolean(WINDOW)),
    "holes": lambda: fused(HOLES, mask=boolean(HOLES)),
    "holes, minimum": lambda: fused(HOLES, mask=additive(HOLES, closed=torch.finfo(torch.float32).min)),
    "no key at all": lambda: fused(HOLES & False, mask=additive(HOLES & False)),
    "ALiBi": lambda: fused(bias=ALIBI, mask=additive(ALL, ALIBI)),
    "ALiBi, causal": lambda: fused(CAUSAL, ALIBI, mask=additive(CAUSAL, ALIBI)),
    "ALiBi, is_causal": lambda: fused(CAUSAL, ALIBI, mask=additive(ALL, ALIBI), is_causal=True),
    "learned bias, padding": lambda: fused(PADDING, LEARNED, mask=additive(PADDING, LEARNED)),
    "grouped": lambda: fused(CAUSAL, key_heads=2, is_causal=True),
    "one key head": lambda: fused(PADDING, key_heads=1, mask=boolean(PADDING)),
    "cross": lambda: fused(np.ones((1, 1, 1, 5), dtype=bool), keys=5, is_cross=True),
    "cache": lambda: fused(np.ones((1, 1, 1, 12), dtype=bool), keys=12),
    "cross of equal length": lambda: fused(is_cross=True),
    "bfloat16": lambda: fused(CAUSAL, dtype=torch.bfloat16, is_causal=True),
    "float16, mask": lambda: fused(
        PADDING, dtype=torch.float16, mask=additive(PADDING, closed=torch.finfo(torch.float16).min).half()
    ),
    "float64": lambda: fused(dtype=torch.float64),
    "flex": lambda: flexible(),
    "flex, padding": lambda: flexible(PADDING & CAUSAL, key_heads=2),
    "flex, score function": lambda: capped(),
    "scores": lambda: given("scores"),
    "scores, padding": lambda: given("scores", PADDING & CAUSAL),
    "scores, holes": lambda: given("scores", HOLES),
    "recorded": lambda: given("recorded"),
    "recorded, padding": lambda: given("recorded", PADDING & CAUSAL),
}
