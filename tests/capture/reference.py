"""Attention one row at a time, in float64 and plain numpy; and what a recorder must not leave behind."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as hooks

ORIGINALS = (F.scaled_dot_product_attention, F.softmax, torch.overrides.has_torch_function)


def attention_rows(
    query: Tensor, key: Tensor, mask: Tensor | None = None, is_causal: bool = False, scale: float | None = None
) -> np.ndarray:
    """Softmax of every row over the keys it may see; rows without any are zero."""
    q, k = query.detach().double().numpy(), key.detach().double().numpy()
    batch, heads, queries, width = q.shape
    keys, group = k.shape[2], heads // k.shape[1]
    full = None if mask is None else mask.detach().expand(batch, heads, queries, keys).numpy()
    weights = np.zeros((batch, heads, queries, keys))
    for b, h, i in np.ndindex(batch, heads, queries):
        row = {}
        for j in range(keys):
            bias = 0.0
            if full is not None and full.dtype == bool:
                bias = 0.0 if full[b, h, i, j] else -math.inf
            elif full is not None:
                bias = -math.inf if full[b, h, i, j] <= np.finfo(full.dtype).min / 2 else float(full[b, h, i, j])
            if bias > -math.inf and not (is_causal and j > i):
                row[j] = q[b, h, i] @ k[b, h // group, j] * (width**-0.5 if scale is None else scale) + bias
        if row:
            top = max(row.values())
            total = sum(math.exp(score - top) for score in row.values())
            for j, score in row.items():
                weights[b, h, i, j] = math.exp(score - top) / total
    return weights


def close(weights: Tensor, expected: np.ndarray | Tensor, tolerance: float = 1e-6) -> bool:
    expected = expected.detach().numpy() if isinstance(expected, Tensor) else expected
    assert tuple(weights.shape) == expected.shape
    return bool(np.abs(weights.detach().double().numpy() - expected).max() <= tolerance)


def left_behind() -> list[str]:
    """What is installed in this process that should not be."""
    found = [
        name
        for name in dir(hooks)
        if name.startswith("_global_") and "registry" not in name and isinstance(getattr(hooks, name), dict)
        if getattr(hooks, name)
    ]
    current = (F.scaled_dot_product_attention, F.softmax, torch.overrides.has_torch_function)
    found += [str(now) for now, original in zip(current, ORIGINALS, strict=True) if now is not original]
    found += [str(torch.overrides._get_current_function_mode_stack())] * (torch._C._len_torch_function_stack() > 0)
    stance = torch._dynamo.eval_frame._stance.stance
    return found + [stance] * (stance != "default")


class SelfAttention(nn.Module):
    """The attention most people write: one projection, heads, the fused function."""

    def __init__(self, width: int = 8, heads: int = 2, is_causal: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.is_causal, self.dropout = heads, is_causal, dropout
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def project(self, tokens: Tensor) -> Tensor:
        return self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        query, key, value = self.project(tokens)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, mask, dropout, self.is_causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


class EagerAttention(SelfAttention):
    """The same by hand."""

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        query, key, value = self.project(tokens)
        scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        weights = F.dropout(scores.softmax(dim=-1), self.dropout, self.training)
        return self.out((weights @ value).transpose(1, 2).flatten(2))


class Stack(nn.Module):
    """Layers with a residual around each, and a head."""

    def __init__(self, *layers: nn.Module, width: int = 8) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(layers), nn.Linear(width, 3)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            tokens = tokens + layer(tokens, mask)
        return self.head(tokens.mean(dim=1))
