"""The statistics as functions of the full matrix that autograd can follow: what gradients are compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_callbacks.capture import AttentionCall
from tests.capture.exact.questions import key_features


def _positions(call: AttentionCall) -> tuple[Tensor, Tensor]:
    weights = call.weights()
    return weights, torch.arange(weights.shape[-1], dtype=weights.dtype)


def _entropy(weights: Tensor) -> Tensor:
    return -(weights * weights.clamp_min(torch.finfo(weights.dtype).tiny).log()).sum(dim=-1)


def _logsumexp(call: AttentionCall) -> Tensor:
    logits = call.logits()
    dead = ~call.allowed().expand(call.shape).any(dim=-1, keepdim=True)
    return logits.masked_fill(dead, 0.0).logsumexp(dim=-1)


def _renyi(weights: Tensor, order: float) -> Tensor:
    total = weights.clamp_min(torch.finfo(weights.dtype).tiny).pow(order).masked_fill(weights == 0, 0.0).sum(dim=-1)
    return total.clamp_min(torch.finfo(weights.dtype).tiny).log() / (1 - order)


def _variance(call: AttentionCall) -> Tensor:
    weights, position = _positions(call)
    return (weights * (position - (weights @ position)[..., None]) ** 2).sum(dim=-1)


def _steps(call: AttentionCall) -> Tensor:
    return torch.arange(call.shape[2])[:, None] - torch.arange(call.shape[3])


def _first(call: AttentionCall, k: int) -> Tensor:
    valid = call.key_valid
    return (call.weights() * (valid & (valid.cumsum(dim=1) <= k))[:, None, None]).sum(dim=-1)


def _offset(call: AttentionCall, offset: int) -> Tensor:
    return (call.weights() * (_steps(call) == -offset)).sum(dim=-1)


def _buckets(call: AttentionCall) -> Tensor:
    weights = call.weights() * call.query_valid[:, None, :, None]
    alive = (weights.detach().sum(dim=-1) > 0).to(weights.dtype)
    of_query, of_key = (F.one_hot(torch.arange(n) * 2 // n, 2).to(weights.dtype) for n in call.shape[2:])
    count = (alive @ of_query).clamp_min(1.0)
    return of_query.mT @ weights @ of_key / count[..., None]


def _rows(values: Tensor, call: AttentionCall) -> Tensor:
    alive = call.allowed().expand(call.shape).any(dim=-1) & call.query_valid[:, None]
    return values * alive.view(alive.shape + (1,) * (values.ndim - 3))


Ask = Callable[[AttentionCall], Tensor]
PAIRS: dict[str, tuple[Ask, Ask]] = {
    "logsumexp": (lambda call: call.logsumexp().values, lambda call: _rows(_logsumexp(call), call)),
    "expectation": (
        lambda call: call.expectation(key_features(call.shape).to(call.query.dtype)).values,
        lambda call: _rows(call.weights() @ key_features(call.shape).to(call.query.dtype), call),
    ),
    "confidence": (lambda call: call.confidence().values, lambda call: _rows(call.weights().amax(dim=-1), call)),
    "entropy": (lambda call: call.entropy().values, lambda call: _rows(_entropy(call.weights()), call)),
    "entropy of both": (
        lambda call: call.entropy_and_expectation(key_features(call.shape).to(call.query.dtype))[0].values,
        lambda call: _rows(_entropy(call.weights()), call),
    ),
    "expectation of both": (
        lambda call: call.entropy_and_expectation(key_features(call.shape).to(call.query.dtype))[1].values,
        lambda call: _rows(call.weights() @ key_features(call.shape).to(call.query.dtype), call),
    ),
    "renyi 0.5": (lambda call: call.renyi_entropy(0.5).values, lambda call: _rows(_renyi(call.weights(), 0.5), call)),
    "renyi 2": (lambda call: call.renyi_entropy().values, lambda call: _rows(_renyi(call.weights(), 2.0), call)),
    "mean position": (
        lambda call: call.mean_position().values,
        lambda call: _rows(
            torch.mv(_positions(call)[0].flatten(0, -2), _positions(call)[1]).view(call.shape[:3]), call
        ),
    ),
    "position variance": (lambda call: call.position_variance().values, lambda call: _rows(_variance(call), call)),
    "mean distance": (
        lambda call: call.mean_distance().values,
        lambda call: _rows((call.weights() * _steps(call).abs()).sum(dim=-1), call),
    ),
    **{
        f"window {width}": (
            lambda call, width=width: call.window_mass(width).values,
            lambda call, width=width: _rows((call.weights() * (_steps(call).abs() <= width)).sum(dim=-1), call),
        )
        for width in (0, 1, 3, 100)
    },
    **{
        f"first {k}": (lambda call, k=k: call.first_mass(k).values, lambda call, k=k: _rows(_first(call, k), call))
        for k in (1, 3)
    },
    **{
        f"offset {offset}": (
            lambda call, offset=offset: call.offset_mass(offset).values,
            lambda call, offset=offset: _rows(_offset(call, offset), call),
        )
        for offset in (-1, 0, 2)
    },
    "received": (
        AttentionCall.received_mass,
        lambda call: (call.weights() * call.query_valid[:, None, :, None]).sum(dim=-2),
    ),
    "buckets": (lambda call: call.bucketed_weights(2, 2), _buckets),
}
ONLY_SQUARE = ("mean distance", "window", "offset")
