"""Attention between words against a loop over pieces."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attn_callbacks.functional.words import word_maps


def test_words_match_loops() -> None:
    weights = torch.rand(2, 3, 6, 5).softmax(dim=-1)
    target = torch.tensor([[-1, 0, 0, 1, 2, -1], [0, 1, 1, 1, -1, -1]])
    source = torch.tensor([[0, 0, 1, 2, -1], [-1, 0, 1, 1, -1]])
    found = word_maps(weights, target, source)
    expected = np.zeros((2, 3, 3, 3))
    for b in range(2):
        for h in range(3):
            for t in range(3):
                rows = [q for q in range(6) if target[b, q] == t]
                for s in range(3):
                    sums = [sum(weights[b, h, q, k].item() for k in range(5) if source[b, k] == s) for q in rows]
                    expected[b, h, t, s] = np.mean(sums) if sums else 0
    np.testing.assert_allclose(found.weights, expected, atol=1e-6)
    assert found.query_valid.tolist() == [[True] * 3, [True, True, False]]
    assert found.key_valid.tolist() == [[True] * 3, [True, True, False]]


def test_rows_sum_to_one_where_every_piece_is_of_a_word() -> None:
    weights = torch.rand(1, 2, 4, 4).softmax(dim=-1)
    words = torch.tensor([[0, 0, 1, 1]])
    torch.testing.assert_close(word_maps(weights, words, words).weights.sum(dim=-1), torch.ones(1, 2, 2))


def test_one_side_of_pieces() -> None:
    weights = torch.rand(1, 1, 3, 4)
    found = word_maps(weights, source_words=torch.tensor([[0, 0, 1, -1]]), sizes=(3, 2))
    expected = torch.stack([weights[..., :2].sum(dim=-1), weights[..., 2]], dim=-1)
    torch.testing.assert_close(found.weights, expected)
    assert found.query_valid.all()


def test_padding_is_of_no_word() -> None:
    weights = torch.rand(1, 1, 3, 3)
    words = torch.tensor([[0, 1, 1]])
    valid = torch.tensor([[True, True, False]])
    found = word_maps(weights, words, words, query_valid=valid, key_valid=valid, sizes=(3, 3))
    torch.testing.assert_close(found.weights[..., :2, :2], weights[..., :2, :2])
    assert not found.weights[..., 2].any()
    assert found.key_valid.tolist() == [[True, True, False]]


def test_half_precision_and_refusals() -> None:
    weights, words = torch.rand(1, 1, 2, 2), torch.tensor([[0, 1]])
    assert word_maps(weights.bfloat16(), words, words).weights.dtype == torch.float32
    with pytest.raises(ValueError, match="`source_words` must number words below 1, got 1"):
        word_maps(weights, words, words, sizes=(2, 1))
    with pytest.raises(ValueError, match=r"`target_words` must have shape \(batch, tokens\) = \(1, 2\), got \(1, 3\)"):
        word_maps(weights, torch.zeros(1, 3), words)
    with pytest.raises(ValueError, match=r"`key_valid` must have shape \(batch, tokens\) = \(1, 2\), got \(2, 2\)"):
        word_maps(weights, words, words, key_valid=torch.ones(2, 2))
    with pytest.raises(ValueError, match="`target_words` is None: all 2 tokens are words, but `sizes` says 5"):
        word_maps(weights, None, words, sizes=(5, 2))
