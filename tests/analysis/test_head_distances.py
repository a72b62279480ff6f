"""Distances between the heads of recorded calls: padding, masks and what cannot be compared."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attn_callbacks.analysis.head_distances import head_distances
from attn_callbacks.capture import AttentionCall, AttentionRecorder
from attn_callbacks.functional.head_distance import head_distance


def call(heads: int = 2, tokens: int = 5, seed: int = 0, **options: object) -> AttentionCall:
    generator = torch.Generator().manual_seed(seed)
    query, key = (3 * torch.randn(3, heads, tokens, 4, generator=generator) for _ in range(2))
    return AttentionCall(f"layer{seed}", query=query, key=key, **options)


def test_it_is_the_distance_of_their_weights() -> None:
    calls = [call(2, seed=0, is_causal=True), call(3, seed=1, is_causal=True)]
    expected = head_distance([each.weights() for each in calls], allowed=torch.ones(5, 5, dtype=torch.bool).tril())
    torch.testing.assert_close(head_distances(calls), expected)


def test_padding_does_not_matter() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    tokens, padding = torch.randn(1, 7, 8), torch.arange(7)[None] >= 5
    with AttentionRecorder(model) as padded:
        model(tokens, src_key_padding_mask=padding)
    with AttentionRecorder(model) as plain:
        model(tokens[:, :5])
    torch.testing.assert_close(head_distances(padded.calls), head_distances(plain.calls), rtol=1e-4, atol=1e-4)


def test_known_padding_of_a_call_counts() -> None:
    valid = torch.tensor([[True] * 3 + [False] * 2] * 3)
    plain = call()
    cut = AttentionCall("cut", query=plain.query[:, :, :3], key=plain.key[:, :, :3])
    found = head_distances([plain.with_valid(valid, valid)])
    torch.testing.assert_close(found, head_distances([cut]), rtol=1e-4, atol=1e-5)


def test_cross_attention_among_itself_is_compared() -> None:
    query, key = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 6, 8)
    assert head_distances([AttentionCall("cross", is_cross=True, query=query, key=key)]).shape == (2, 3, 3)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="`calls` mix self- and cross-attention"):
        head_distances([call(), call(is_cross=True)])
    with pytest.raises(ValueError, match="the masks of layers 0 and 1 differ"):
        head_distances([call(), call(is_causal=True)])
    with pytest.raises(ValueError, match=r"layer 1 \(1, 2, 6, 6\)"):
        head_distances([call(), call(tokens=6)])
    with pytest.raises(ValueError, match="at least one call"):
        head_distances([])


def test_recorded_weights_may_be_exactly_zero() -> None:
    """An exact zero is a weight too small for its type, not a mask of that head alone."""
    weights = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.5, 0.25, 0.25]])
    others = torch.tensor([[0.2, 0.4, 0.4], [0.3, 0.3, 0.4], [0.1, 0.8, 0.1]])
    both = torch.stack([weights, others])[None]
    found = head_distances([AttentionCall("layer", recorded=both)])
    torch.testing.assert_close(found, head_distance(both, allowed=torch.ones(3, 3, dtype=torch.bool)))
