"""Importance of keys from attention, against loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attn_callbacks.functional.feature_importance import (
    attention_gradient_mass,
    received_attention,
    top_features,
    value_weighted_attention,
)

BATCH, HEADS, QUERIES, KEYS, WIDTH = 2, 3, 4, 4, 5


@pytest.fixture(name="tensors")
def random_tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(0)
    weights = torch.randn(BATCH, HEADS, QUERIES, KEYS, generator=source).softmax(dim=-1)
    gradients = torch.randn(weights.shape, generator=source)
    value = torch.randn(BATCH, HEADS, KEYS, WIDTH, generator=source)
    return weights, gradients, value, torch.tensor([[True, True, True, False], [True] * 4])


@pytest.mark.parametrize("query", [None, 1, -1])
def test_against_loops(tensors: tuple[torch.Tensor, ...], query: int | None) -> None:
    weights, gradients, value, valid = tensors
    received, slope, length = np.zeros((3, BATCH, KEYS))
    for sample in range(BATCH):
        rows = [i for i in range(QUERIES) if valid[sample, i]] if query is None else [query]
        for key in range(KEYS):
            for row in rows:
                cells = [(float(weights[sample, h, row, key]), gradients[sample, h, row, key]) for h in range(HEADS)]
                received[sample, key] += sum(weight for weight, _ in cells) / HEADS / len(rows)
                slope[sample, key] += sum(weight * float(gradient) for weight, gradient in cells)
                squares = [(cells[h][0] * value[sample, h, key].numpy()) ** 2 for h in range(HEADS)]
                length[sample, key] += np.sqrt(np.sum(squares)) / len(rows)
    found = received_attention(weights, valid=valid, query=query)
    np.testing.assert_allclose(found, received, rtol=1e-5)
    np.testing.assert_allclose(
        attention_gradient_mass(weights, gradients, valid=valid, query=query), slope, rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(value_weighted_attention(weights, value, valid=valid, query=query), length, rtol=1e-5)


def test_gradient_mass_is_the_first_order_change(tensors: tuple[torch.Tensor, ...]) -> None:
    weights, _, value, _ = tensors

    def output(maps: torch.Tensor) -> torch.Tensor:
        return (maps @ value).square().sum()

    maps = weights.double().requires_grad_()
    value = value.double()
    (gradient,) = torch.autograd.grad(output(maps), maps)
    found = attention_gradient_mass(weights.double(), gradient)
    small = 1e-6
    less = weights.double().clone()
    less[0, :, :, 2] *= 1 - small
    change = (output(weights.double()) - output(less)) / small
    torch.testing.assert_close(found[0, 2], change, rtol=1e-4, atol=1e-4)


def test_top_features() -> None:
    scores = torch.tensor([[0.5, 0.9, torch.nan, 0.9, 0.1], [0.0, 0.0, 0.0, 0.0, 0.0]])
    features = torch.tensor([[True, True, True, True, False], [True] * 5])
    assert top_features(scores, 0.5, features).int().tolist() == [[0, 1, 0, 1, 0], [1, 1, 1, 0, 0]]
    assert top_features(torch.arange(10.0)[None], 0.1).sum() == 1
    assert top_features(torch.arange(10.0)[None], 0.01).sum() == 1
    assert torch.equal(top_features(scores, 1.0, features), features)
    assert top_features(torch.tensor([[1, 9, 5]]), 0.3).tolist() == [[False, True, False]]


def test_refusals(tensors: tuple[torch.Tensor, ...]) -> None:
    weights, gradients, _, valid = tensors
    with pytest.raises(ValueError, match="`query` must lie between -4 and 3, got 4"):
        received_attention(weights, query=4)
    with pytest.raises(ValueError, match="`gradients` must have the shape"):
        attention_gradient_mass(weights, gradients[:1])
    with pytest.raises(ValueError, match="`valid` must have shape"):
        received_attention(weights, valid=valid[:, :2])
    with pytest.raises(ValueError, match="`share` must be above 0"):
        top_features(torch.ones(1, 2), 0.0)
