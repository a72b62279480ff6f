"""Statistics of attention from the full matrix, one row at a time, in float64 and plain numpy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attn_callbacks.capture import AttentionCall

MASKED = -1e8


@dataclass(frozen=True, eq=False)
class Expected:
    """What a statistic of every query is: 0 where it does not count."""

    values: np.ndarray  # (batch, heads, queries) or (batch, heads, queries, features)
    counted: np.ndarray  # (batch, heads, queries)

    def mean(self) -> np.ndarray:
        means = np.full(self.values.shape[:2] + self.values.shape[3:], np.nan)
        for b, h in np.ndindex(self.values.shape[:2]):
            rows = self.values[b, h][self.counted[b, h]]
            if len(rows):
                means[b, h] = rows.mean(axis=0)
        return means


class Reference:
    """Scores and weights of a call, read from its fields; every method is one statistic by its definition."""

    def __init__(self, call: AttentionCall) -> None:
        self.shape = call.shape
        self.batch, self.heads, self.queries, self.keys = call.shape
        self.query_valid, self.key_valid = call.query_valid.numpy(), call.key_valid.numpy()
        self.allowed = np.zeros(self.shape, dtype=bool)
        self.scores = np.full(self.shape, -math.inf)
        self.weights = np.zeros(self.shape)
        fill = self._recorded if call.recorded is not None else self._computed
        fill(call)
        self.counted = self.allowed.any(axis=-1) & self.query_valid[:, None]

    def _recorded(self, call: AttentionCall) -> None:
        self.weights = np.nan_to_num(call.recorded.detach().double().numpy())
        self.allowed = self.weights > 0

    def _computed(self, call: AttentionCall) -> None:
        for b, h, i in np.ndindex(self.shape[:3]):
            scores, allowed = _score_row(call, b, h, i)
            self.allowed[b, h, i] = allowed
            if allowed.any():
                self.scores[b, h, i, allowed] = scores[allowed]
                powers = np.exp(scores[allowed] - scores[allowed].max())
                self.weights[b, h, i, allowed] = powers / powers.sum()

    def each_row(
        self, value: Callable[[int, int, int], object], counts: Callable[[int, int, int], bool] | None = None
    ) -> Expected:
        counted = self.counted.copy()
        rows: dict[tuple[int, ...], object] = {}
        for row in np.ndindex(self.shape[:3]):
            counted[row] &= counts is None or counts(*row)
            if counted[row]:
                rows[row] = value(*row)
        trailing = np.shape(next(iter(rows.values()))) if rows else ()
        values = np.zeros((*self.shape[:3], *trailing))
        for row, number in rows.items():
            values[row] = number
        return Expected(values, counted)

    def logsumexp(self) -> Expected:
        return self.each_row(lambda b, h, i: _logsumexp(self.scores[b, h, i]))

    def expectation(self, features: Tensor) -> Expected:
        table = features.detach().double().numpy()
        return self.each_row(lambda b, h, i: self.weights[b, h, i] @ (table if table.ndim == 2 else table[b, h]))

    def max_logit(self) -> Expected:
        return self.each_row(lambda b, h, i: max(self.scores[b, h, i]))

    def confidence(self) -> Expected:
        return self.each_row(lambda b, h, i: max(self.weights[b, h, i]))

    def entropy(self) -> Expected:
        return self.each_row(lambda b, h, i: -sum(p * math.log(p) for p in self.weights[b, h, i] if p > 0))

    def renyi_entropy(self, order: float) -> Expected:
        def value(b: int, h: int, i: int) -> float:
            return math.log(sum(p**order for p in self.weights[b, h, i] if p > 0)) / (1 - order)

        return self.each_row(value)

    def mean_position(self) -> Expected:
        return self.each_row(lambda b, h, i: self.weights[b, h, i] @ np.arange(self.keys))

    def position_variance(self) -> Expected:
        def value(b: int, h: int, i: int) -> float:
            mean = self.weights[b, h, i] @ np.arange(self.keys)
            return self.weights[b, h, i] @ (np.arange(self.keys) - mean) ** 2

        return self.each_row(value)

    def mean_distance(self) -> Expected:
        return self.each_row(lambda b, h, i: self.weights[b, h, i] @ np.abs(i - np.arange(self.keys)))

    def window_mass(self, width: int) -> Expected:
        return self.each_row(lambda b, h, i: self.weights[b, h, i, max(i - width, 0) : i + width + 1].sum())

    def far_mass(self, width: int | tuple[int, ...]) -> Expected:
        widths = [width] * self.batch if isinstance(width, int) else width
        return self.each_row(lambda b, h, i: self.weights[b, h, i, np.abs(i - np.arange(self.keys)) > widths[b]].sum())

    def first_mass(self, k: int) -> Expected:
        """A row counts where it may attend to one of these keys."""
        first = [np.flatnonzero(valid)[:k] for valid in self.key_valid]
        return self.each_row(
            lambda b, h, i: self.weights[b, h, i, first[b]].sum(),
            lambda b, h, i: bool(self.allowed[b, h, i, first[b]].any()),
        )

    def offset_mass(self, offset: int) -> Expected:
        """A row counts where that key is a token to which it may attend."""

        def exists(b: int, h: int, i: int) -> bool:
            key = i + offset
            return 0 <= key < self.keys and bool(self.allowed[b, h, i, key] and self.key_valid[b, key])

        return self.each_row(lambda b, h, i: self.weights[b, h, i, i + offset], exists)

    def received_mass(self) -> np.ndarray:
        received = np.zeros((self.batch, self.heads, self.keys))
        for b, h, i in zip(*np.nonzero(self.counted), strict=True):
            received[b, h] += self.weights[b, h, i]
        return received

    def bucketed_weights(self, query_buckets: int, key_buckets: int) -> np.ndarray:
        sums = np.zeros((self.batch, self.heads, query_buckets, key_buckets))
        counts = np.zeros((self.batch, self.heads, query_buckets))
        for b, h, i in zip(*np.nonzero(self.counted), strict=True):
            part = i * query_buckets // self.queries
            counts[b, h, part] += 1
            for j in range(self.keys):
                sums[b, h, part, j * key_buckets // self.keys] += self.weights[b, h, i, j]
        return sums / np.maximum(counts, 1)[..., None]


def _logsumexp(scores: np.ndarray) -> float:
    return scores.max() + math.log(np.exp(scores - scores.max()).sum())


def _score_row(call: AttentionCall, b: int, h: int, i: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores of one query and the keys it may attend to."""
    keys = call.shape[-1]
    allowed = np.arange(keys) <= i if call.is_causal else np.ones(keys, dtype=bool)
    if call.scores is not None:
        scores = call.scores[b, h, i].detach().double().numpy()
        return scores, allowed & (scores > MASKED)
    query, key = call.query, call.key
    own = query[b % len(query), h % query.shape[1], i].detach().double().numpy()
    # heads are grouped: neighbours share a key head
    theirs = key[b % len(key), h * key.shape[1] // call.shape[1]].detach().double().numpy()
    scores = theirs @ own * (len(own) ** -0.5 if call.scale is None else call.scale)
    if call.mask is not None:
        mask = call.mask.expand(call.shape)[b, h, i].detach()
        if mask.dtype == torch.bool:
            allowed = allowed & mask.numpy()
        else:
            allowed = allowed & (mask.double().numpy() > max(MASKED, torch.finfo(mask.dtype).min / 2))
            scores = scores + mask.double().numpy()
    for j in range(keys) if call.mask_mod or call.score_mod else ():
        where = [torch.tensor(position) for position in (b, h, i, j)]
        if call.mask_mod is not None:
            allowed[j] &= bool(call.mask_mod(*where))
        if call.score_mod is not None:
            scores[j] = float(call.score_mod(torch.tensor(scores[j]), *where))
    return scores, allowed
