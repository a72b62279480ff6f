"""Attention calls of every kind that models make, small."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from attn_callbacks.capture import AttentionCall
from tests.capture.exact.reference import Reference

LENGTH, HEADS = 13, 4
SLOPES = 2.0 ** -torch.arange(1.0, HEADS + 1)[:, None, None]
INFINITE, LOWEST, BIG = -math.inf, torch.finfo(torch.float32).min, -1e9


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def chance(*shape: int, share: float, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))) < share


def attention(
    queries: int = LENGTH,
    keys: int | None = None,
    *,
    batch: int = 2,
    heads: int = HEADS,
    key_heads: int | None = None,
    width: int = 8,
    dtype: torch.dtype = torch.float32,
    **options: object,
) -> AttentionCall:
    keys = queries if keys is None else keys
    query = noise(batch, heads, queries, width, dtype=dtype) * 1.5
    key = noise(batch, heads if key_heads is None else key_heads, keys, width, seed=1, dtype=dtype)
    return AttentionCall("a", query=query, key=key, enable_gqa=key_heads is not None, **options)


def padding(side: str = "right", length: int = LENGTH, pads: int = 5) -> Tensor:
    """``(2, 1, 1, length)``: the second sample is short."""
    keep = torch.ones(2, 1, 1, length, dtype=torch.bool)
    keep[1, ..., slice(-pads, None) if side == "right" else slice(0, pads)] = False
    return keep


def triangle(length: int = LENGTH) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()[None, None]


def window(width: int, length: int = LENGTH) -> Tensor:
    return triangle(length) & ~torch.ones(length, length, dtype=torch.bool).tril(-width)


def additive(allowed: Tensor, lowest: float = INFINITE, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, lowest)


def steps(length: int = LENGTH) -> Tensor:
    return torch.arange(length)[:, None] - torch.arange(length)


def holes() -> Tensor:
    """Some rows have no key at all."""
    allowed = chance(2, 1, LENGTH, LENGTH, share=0.3)
    allowed[0, 0, 3], allowed[1, 0, [0, 12]] = False, False
    return allowed


def relative_bias(length: int = LENGTH) -> Tensor:
    """T5's: a number for each head and bucket of distances."""
    return noise(HEADS, 9)[:, steps(length).clamp(-4, 4) + 4][None]


def known(tensor_of: Callable[[AttentionCall], dict[str, Tensor]], call: AttentionCall) -> AttentionCall:
    return AttentionCall("a", **tensor_of(call))


def half_sink() -> AttentionCall:
    """Recorded rows that sum to less than one: the rest went to a virtual key."""
    return AttentionCall("a", recorded=attention().weights() * (0.2 + 0.8 * chance(2, 4, 13, 1, share=0.5)))


def views() -> AttentionCall:
    both = noise(2, LENGTH, 2, HEADS, 8).permute(2, 0, 3, 1, 4)
    return AttentionCall("a", query=both[0], key=both[1], is_causal=True)


def lengths_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return k < torch.tensor([LENGTH, 6])[b]


BOOLEAN: dict[str, Callable[[], AttentionCall]] = {
    "plain": attention,
    "causal": lambda: attention(is_causal=True),
    "padding right": lambda: attention(mask=padding()),
    "padding left": lambda: attention(mask=padding("left")),
    "causal, padding right": lambda: attention(mask=padding(), is_causal=True),
    "causal, padding left": lambda: attention(mask=padding("left"), is_causal=True),
    "padding with a hole": lambda: attention(mask=padding() & (torch.arange(LENGTH) != 4)),
    "pairs": lambda: attention(mask=chance(1, 1, LENGTH, LENGTH, share=0.6) | (steps() == 0)),
    "causal pairs": lambda: attention(mask=chance(1, 1, LENGTH, LENGTH, share=0.6), is_causal=True),
    "triangle": lambda: attention(mask=triangle()),
    "triangle and padding right": lambda: attention(mask=triangle() & padding()),
    "triangle and padding left": lambda: attention(mask=triangle() & padding("left")),
    "sliding window": lambda: attention(mask=window(4)),
    "sliding window, padding left": lambda: attention(mask=window(4) & padding("left")),
    "two-sided window": lambda: attention(mask=(steps().abs() <= 3)[None, None]),
    "rows without keys": lambda: attention(mask=holes()),
    "no key anywhere": lambda: attention(mask=torch.zeros(1, 1, 1, LENGTH, dtype=torch.bool)),
    "one sample without keys": lambda: attention(mask=padding(pads=LENGTH)),
    "mask of each head": lambda: attention(mask=chance(2, HEADS, LENGTH, LENGTH, share=0.5)),
    "rows without keys in some heads": lambda: attention(mask=chance(2, HEADS, LENGTH, LENGTH, share=0.12)),
    "key mask of each head": lambda: attention(mask=chance(1, HEADS, 1, LENGTH, share=0.5)),
    "queries masked": lambda: attention(mask=chance(2, 1, LENGTH, 1, share=0.7)),
    "one number masked": lambda: attention(mask=torch.tensor([True, False])[:, None, None, None]),
    "grouped heads": lambda: attention(key_heads=2),
    "grouped heads, causal, padding left": lambda: attention(key_heads=2, mask=padding("left"), is_causal=True),
    "one key head": lambda: attention(key_heads=1, mask=triangle() & padding()),
    "cross, fewer queries": lambda: attention(5, 12, is_cross=True),
    "cross, fewer keys, padding": lambda: attention(12, 7, is_cross=True, mask=padding(length=7)),
    "cross, as many, padding left": lambda: attention(is_cross=True, mask=padding("left")),
    "causal, fewer queries": lambda: attention(5, 9, is_causal=True),
    "causal, fewer keys": lambda: attention(9, 5, is_causal=True, mask=padding(length=5, pads=2)),
    "cache": lambda: attention(1, 9, mask=padding("left", 9)),
    "cache of a chunk": lambda: attention(3, 9, mask=torch.ones(3, 9).bool().tril(6)[None, None]),
    "one token": lambda: attention(1),
    "two tokens, causal": lambda: attention(2, is_causal=True),
}
OTHER: dict[str, Callable[[], AttentionCall]] = {
    "float padding, infinite": lambda: attention(mask=additive(padding())),
    "float padding, lowest": lambda: attention(mask=additive(padding("left"), LOWEST)),
    "float padding, big": lambda: attention(mask=additive(padding(), BIG), is_causal=True),
    "float triangle and padding left, infinite": lambda: attention(mask=additive(triangle() & padding("left"))),
    "float triangle and padding left, lowest": lambda: attention(mask=additive(triangle() & padding("left"), LOWEST)),
    "float holes, lowest": lambda: attention(mask=additive(holes(), LOWEST)),
    "float holes, big": lambda: attention(mask=additive(holes(), BIG), key_heads=2),
    "key bias": lambda: attention(mask=noise(1, HEADS, 1, LENGTH)),
    "key bias, causal, padding": lambda: attention(mask=noise(2, 1, 1, LENGTH) + additive(padding()), is_causal=True),
    "query bias": lambda: attention(mask=noise(1, HEADS, LENGTH, 1), is_causal=True),
    "scale": lambda: attention(scale=0.7, is_causal=True),
    "negative scale": lambda: attention(scale=-0.3, mask=padding()),
    "width 20": lambda: attention(width=20, is_causal=True),
    "width 64": lambda: attention(width=64, heads=2, mask=padding("left")),
    "width 7": lambda: attention(width=7, key_heads=2, mask=triangle() & padding("left")),
    "width 1": lambda: attention(width=1),
    "long": lambda: attention(300, batch=1, heads=2, is_causal=True),
    "long, padding": lambda: attention(300, heads=1, mask=padding("left", 300, 70)),
    "long, window": lambda: attention(700, heads=1, batch=1, mask=window(50, 700)),
    "long, triangle and padding": lambda: attention(
        300, heads=2, key_heads=1, mask=triangle(300) & padding("left", 300, 140)
    ),
    "long, cross": lambda: attention(270, 530, heads=1, is_cross=True, mask=padding(length=530, pads=300)),
    "double": lambda: attention(dtype=torch.float64, is_causal=True, mask=padding("left")),
    "bfloat16": lambda: attention(dtype=torch.bfloat16, is_causal=True),
    "bfloat16, triangle and padding": lambda: attention(dtype=torch.bfloat16, mask=triangle() & padding("left")),
    "float16": lambda: attention(
        dtype=torch.float16, mask=additive(padding(), torch.finfo(torch.float16).min, torch.float16)
    ),
    "views": views,
    "one for the batch": lambda: AttentionCall("a", query=noise(1, 1, 6, 8), key=noise(2, 4, 6, 8), mask=None),
    "flex causal": lambda: attention(mask_mod=lambda b, h, q, k: q >= k),
    "flex window": lambda: attention(mask_mod=lambda b, h, q, k: (q >= k) & (q - k < 4), key_heads=2),
    "flex lengths": lambda: attention(mask_mod=lengths_mod),
    "scores": lambda: known(lambda c: {"scores": c.logits()}, attention(is_causal=True)),
    "scores, lowest": lambda: known(
        lambda c: {"scores": c.logits().clamp_min(LOWEST)}, attention(mask=triangle() & padding("left"))
    ),
    "scores, long": lambda: known(lambda c: {"scores": c.logits()}, attention(300, batch=1, heads=1)),
    "recorded": lambda: known(
        lambda c: {"recorded": c.weights()}, attention(is_causal=True, mask=padding("left"), key_heads=2)
    ),
    "recorded, virtual key": half_sink,
    "recorded, bfloat16": lambda: known(lambda c: {"recorded": c.weights().bfloat16()}, attention(mask=padding())),
    "queries known": lambda: attention(is_causal=True).with_valid(queries=chance(2, LENGTH, share=0.6)),
    "keys known": lambda: attention(mask=padding()).with_valid(keys=padding()[:, 0, 0] & (torch.arange(13) > 1)),
    "cross, queries known": lambda: attention(6, 9, is_cross=True).with_valid(chance(2, 6, share=0.6)),
}
BIASED: dict[str, Callable[[], AttentionCall]] = {
    "bias": lambda: attention(mask=noise(2, HEADS, LENGTH, LENGTH)),
    "bias with holes": lambda: attention(mask=noise(1, 1, LENGTH, LENGTH) + additive(holes())),
    "bias, causal, grouped heads": lambda: attention(mask=noise(1, HEADS, LENGTH, LENGTH), is_causal=True, key_heads=2),
    "bias of cross attention": lambda: attention(5, 12, is_cross=True, mask=noise(1, HEADS, 5, 12)),
    "ALiBi, causal": lambda: attention(mask=additive(triangle()) - (SLOPES * steps().abs())[None]),
    "ALiBi": lambda: attention(mask=-(SLOPES * steps().abs())[None]),
    "T5": lambda: attention(mask=relative_bias(), scale=1.0),
    "T5, padding": lambda: attention(mask=relative_bias() + additive(padding(), LOWEST), scale=1.0),
    "T5, long": lambda: attention(150, mask=relative_bias(150) + additive(padding("left", 150, 60)), scale=0.3),
}
CAPPED: dict[str, Callable[[], AttentionCall]] = {
    "flex soft cap": lambda: attention(score_mod=lambda s, b, h, q, k: 2.0 * torch.tanh(s / 2.0)),
    "flex soft cap, causal": lambda: attention(
        score_mod=lambda s, b, h, q, k: s - 0.1 * (q - k), mask_mod=lambda b, h, q, k: q >= k, key_heads=2
    ),
    "flex soft cap, long": lambda: attention(
        90,
        heads=1,
        score_mod=lambda s, b, h, q, k: 2.0 * torch.tanh(s / 2.0),
        mask_mod=lambda b, h, q, k: (q - k).abs() < 70 - 60 * b,
    ),
}
CASES = {**BOOLEAN, **OTHER, **BIASED, **CAPPED}
SHAPES = ("plain", "causal", "padding left", "triangle and padding left", "grouped heads, causal, padding left")


@cache
def made(name: str) -> tuple[AttentionCall, Reference]:
    call = CASES[name]()
    return call, Reference(call)


def is_square(call: AttentionCall) -> bool:
    return not call.is_cross and call.shape[2] == call.shape[3]
