"""Head statistics written out as loops over single numbers, in float64: what the vectorised code is compared with."""

from __future__ import annotations

import math

import numpy as np
import torch

from attn_callbacks.functional import STATISTICS

NAMES = (
    "entropy",
    "entropy_normalised",
    "confidence",
    "distance",
    "long_range_mass",
    "self_mass",
    "previous_mass",
    "next_mass",
    "first_mass",
    "max_logit",
)


def named(values: torch.Tensor) -> dict[str, float]:
    """One head of one sample as a dict."""
    return dict(zip(STATISTICS, values[0, 0].tolist(), strict=True))


def random_case(padding: str, causal: bool, batch: int = 3, heads: int = 2, tokens: int = 7, seed: int = 0):
    """Random attention with samples of different length, as numpy arrays of full size."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(2, tokens, size=batch) if padding else np.full(batch, tokens)
    index = np.arange(tokens)
    key_valid = index >= (tokens - lengths)[:, None] if padding == "left" else index < lengths[:, None]
    pairs = np.tril(np.ones((tokens, tokens), dtype=bool)) if causal else np.ones((tokens, tokens), dtype=bool)
    allowed = np.broadcast_to(pairs & key_valid[:, None, None], (batch, heads, tokens, tokens))
    logits = 3 * generator.standard_normal((batch, heads, tokens, tokens))
    positions = np.broadcast_to(index, (batch, tokens))
    return softmax_rows(logits, allowed), logits, positions, allowed, key_valid, key_valid


def as_tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.tensor(np.ascontiguousarray(array)) for array in arrays]


def softmax_rows(logits: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Softmax over the allowed keys; a row without any is zero."""
    weights = np.zeros(logits.shape)
    for row in np.ndindex(logits.shape[:-1]):
        keys = np.flatnonzero(allowed[row])
        if len(keys):
            scores = np.exp(logits[row][keys] - logits[row][keys].max())
            weights[row][keys] = scores / scores.sum()
    return weights


def reference_statistics(weights, logits, positions, allowed, valid, key_valid, long_range=0.25):
    """All arguments are full-sized arrays; the output is (batch, heads, statistics)."""
    batch, heads, rows, keys = weights.shape
    output = np.full((batch, heads, len(NAMES)), np.nan)
    for b in range(batch):
        tokens = [j for j in range(keys) if key_valid[b, j]]
        limit = long_range * len(tokens) if long_range < 1 else long_range
        for h in range(heads):
            found: dict[str, list[float]] = {name: [] for name in NAMES}
            for r in range(rows):
                if valid[b, r]:
                    i = int(positions[b, r])
                    open_keys = {j for j in tokens if allowed[b, h, r, j]}
                    if open_keys:
                        _add_row(found, weights[b, h, r], logits[b, h, r], i, open_keys, tokens[0], limit)
            for k, name in enumerate(NAMES):
                if found[name]:
                    output[b, h, k] = max(found[name]) if name == "max_logit" else sum(found[name]) / len(found[name])
    return output


def _add_row(found, weights, logits, i, open_keys, first, limit):
    entropy = -sum(weights[j] * math.log(weights[j]) for j in open_keys if weights[j] > 0)
    found["entropy"].append(entropy)
    if len(open_keys) > 1:
        found["entropy_normalised"].append(entropy / math.log(len(open_keys)))
    found["confidence"].append(max(weights[j] for j in open_keys))
    found["distance"].append(sum(weights[j] * abs(i - j) for j in open_keys))
    found["long_range_mass"].append(sum(weights[j] for j in open_keys if abs(i - j) > limit))
    for name, j in (("self_mass", i), ("previous_mass", i - 1), ("next_mass", i + 1), ("first_mass", first)):
        if j in open_keys:
            found[name].append(weights[j])
    found["max_logit"].append(max(logits[j] for j in open_keys))
