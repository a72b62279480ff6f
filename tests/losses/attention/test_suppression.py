"""Suppression against plain numpy loops, its threshold, the rows that count, and what it guarantees."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losses.attention.suppression import AttentionSuppressionLoss, attention_suppression


def attention(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype).softmax(dim=-1)


def reference(layers, mask, valid, threshold, reduction):
    """The definition, one weight at a time, in float64."""
    batch, keys = layers[0].shape[0], layers[0].shape[3]
    values, counted = np.zeros(batch), 0
    for sample in range(batch):
        real = [key for key in range(keys) if valid is None or valid[sample, key]]
        degree = {key: float(mask[sample, key]) for key in real}
        if sum(degree.values()) == 0 or sum(degree.values()) == len(real):
            continue
        by_layer = []
        for layer in layers:
            square = layer.shape[2] == keys
            costs, shares = [], []
            for head in range(layer.shape[1]):
                for row in real if square else range(layer.shape[2]):
                    weights = {key: float(layer[sample, head, row, key]) for key in real}
                    share = 1 - degree[row] if square else 1.0
                    if sum(weights.values()) < 1e-6 or share == 0:
                        continue
                    mass = sum(weights[key] * degree[key] for key in real) / sum(weights.values())
                    costs.append(max(0.0, -math.log(1 - mass) + math.log(1 - threshold)))
                    shares.append(share)
            if costs:
                by_layer.append(np.average(costs, weights=shares))
        if by_layer:
            values[sample] = np.mean(by_layer)
            counted += 1
    return {"none": values, "sum": values.sum(), "mean": values.sum() / max(counted, 1)}[reduction]


MASK = torch.tensor([[1, 0, 0, 0.5, 0], [0, 0.25, 0, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0]])
VALID = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 1, 1], [1, 1, 1, 1, 0]]).bool()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("threshold", [0.0, 0.2])
@pytest.mark.parametrize("valid", [VALID, None], ids=["padded", "all"])
def test_against_loops(valid, threshold, reduction):
    layers = [attention(4, 3, 5, 5), attention(4, 2, 5, 5, seed=1), attention(4, 1, 3, 5, seed=2)]
    layers[0][0, :, 2] = 0  # a row that may attend to nothing
    given = attention_suppression(layers, MASK, valid, threshold=threshold, reduction=reduction)
    expected = reference(layers, MASK, valid, threshold, reduction)
    np.testing.assert_allclose(given.numpy(), expected, rtol=2e-5, atol=1e-6)


def test_mass_up_to_the_threshold_costs_nothing_and_moves_nothing():
    rows = torch.tensor([[0.25, 0.75, 0.0], [0.125, 0.375, 0.5], [0.5, 0.5, 0.0]])
    weights = rows[None, None].clone().requires_grad_()
    mask = torch.tensor([[1, 0, 0]])
    cross = weights.expand(1, 1, 3, 3)[:, :, [0, 1, 2, 2]]  # four queries: cross-attention, every row counts
    loss = attention_suppression(cross, mask, threshold=0.25)
    loss.backward()
    assert loss.item() == pytest.approx(2 * math.log(0.75 / 0.5) / 4, rel=1e-5)
    assert weights.grad[0, 0, :2].eq(0).all()
    assert weights.grad[0, 0, 2, 0] > 0
    assert attention_suppression(cross, mask, threshold=0.5).item() == 0.0


def test_no_mass_costs_exactly_zero():
    weights = torch.eye(4)[[1, 2, 3, 1]][None, None]
    assert attention_suppression(weights, torch.tensor([[1, 0, 0, 0]])).item() == 0.0


def test_the_whole_mass_is_finite_with_a_gradient():
    for dtype in (torch.float32, torch.float16):
        weights = torch.eye(4, dtype=dtype)[[0, 0, 0, 0]][None, None].clone().requires_grad_()
        loss = attention_suppression(weights, torch.tensor([[1, 0, 0, 0]]), reduction="sum")
        loss.backward()
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(20 * math.log(2), rel=1e-4)
        assert weights.grad.isfinite().all()
        assert weights.grad[0, 0, 1, 1:].lt(0).all()


def test_what_a_forbidden_query_attends_to_does_not_count():
    weights, mask = attention(1, 2, 4, 4), torch.tensor([[1, 0, 0, 0]])
    other = weights.clone()
    other[:, :, 0] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    torch.testing.assert_close(attention_suppression(other, mask), attention_suppression(weights, mask))
    half = attention_suppression(other, mask * 0.5) - attention_suppression(weights, mask * 0.5)
    assert half > 0.01  # half a member is half a query


def test_every_query_counts_in_cross_attention():
    weights, mask = attention(1, 2, 3, 4), torch.tensor([[1, 0, 0, 0]])
    expected = -torch.log(1 - weights[..., 0]).mean()
    torch.testing.assert_close(attention_suppression(weights, mask), expected)


def test_zero_loss_in_all_layers_keeps_other_tokens_independent_of_the_set():
    torch.manual_seed(0)
    tokens, values = torch.randn(1, 4, 8), [torch.nn.Linear(8, 8) for _ in range(2)]
    maps = [attention(1, 1, 4, 4, seed=seed) for seed in range(2)]
    for layer in maps:
        layer[:, :, 1:, 0] = 0
        layer /= layer.sum(-1, keepdim=True)

    def run(layers, start):
        state = start
        for layer, value in zip(layers, values, strict=True):
            state = state + layer[:, 0] @ value(state)
        return state[:, 1:]

    mask = torch.tensor([[1, 0, 0, 0]])
    other = tokens.clone()
    other[:, 0] += 1
    assert attention_suppression(maps, mask).item() == 0.0
    torch.testing.assert_close(run(maps, other), run(maps, tokens))
    leaky = [maps[0], attention(1, 1, 4, 4)]
    assert attention_suppression(leaky, mask) > 0.05
    assert not torch.allclose(run(leaky, other), run(leaky, tokens))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("empty", ["mask", "full", "valid", "rows", "batch"])
def test_nothing_to_suppress_is_a_finite_zero_with_a_gradient(empty, reduction):
    weights = (attention(0 if empty == "batch" else 2, 2, 3, 3) * (empty != "rows")).requires_grad_()
    mask = torch.zeros(len(weights), 3) if empty == "mask" else torch.eye(3)[: len(weights)]
    mask = torch.ones(len(weights), 3) if empty == "full" else mask
    valid = torch.zeros(len(weights), 3) if empty == "valid" else None
    loss = attention_suppression(weights, mask, valid, reduction=reduction)
    loss.sum().backward()
    assert loss.sum().item() == 0.0
    assert weights.grad.eq(0).all()


def test_samples_without_a_set_leave_the_average():
    weights, mask = attention(3, 2, 4, 4), torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 1]])
    torch.testing.assert_close(attention_suppression(weights, mask), attention_suppression(weights[1:2], mask[1:2]))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_padding_never_changes_the_loss(data):
    batch, heads, keys, extra = (data.draw(st.integers(1, high)) for high in (3, 2, 6, 4))
    left = data.draw(st.integers(0, extra))
    row = st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=keys, max_size=keys)
    mask = torch.tensor(data.draw(st.lists(row, min_size=batch, max_size=batch)))
    weights = attention(batch, heads, keys, keys, seed=data.draw(st.integers(0, 99)))
    padded = torch.rand(batch, heads, keys + extra, keys + extra)
    inside = slice(left, left + keys)
    padded[:, :, inside, inside] = weights
    wide, valid = torch.ones(batch, keys + extra), torch.zeros(batch, keys + extra)
    wide[:, inside], valid[:, inside] = mask, 1
    given = attention_suppression(padded, wide, valid, threshold=0.1, reduction="none")
    expected = attention_suppression(weights, mask, threshold=0.1, reduction="none")
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-6)


def test_gradcheck():
    scores = torch.randn(2, 2, 4, 4, dtype=torch.float64).requires_grad_()
    mask, valid = torch.tensor([[1, 0, 0, 0], [0, 0.5, 1, 0]]), torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])

    def loss(values):
        weights = values.softmax(dim=-1)
        return attention_suppression([weights, weights**2], mask, valid, threshold=0.05)

    assert torch.autograd.gradcheck(loss, (scores,))


def test_following_the_gradient_empties_the_set():
    scores = torch.zeros(1, 1, 3, 3, requires_grad=True)
    optimizer = torch.optim.Adam([scores], lr=0.3)
    for _ in range(60):
        optimizer.zero_grad()
        attention_suppression(scores.softmax(dim=-1), torch.tensor([[1, 0, 0]]), threshold=0.01).backward()
        optimizer.step()
    assert scores.softmax(dim=-1)[0, 0, 1:, 0].max() < 0.015


def test_module_is_the_function():
    weights = attention(4, 2, 5, 5)
    module = AttentionSuppressionLoss(0.1, "sum")
    expected = attention_suppression(weights, MASK, VALID, threshold=0.1, reduction="sum")
    torch.testing.assert_close(module([weights], MASK, VALID), expected)
    assert repr(module) == "AttentionSuppressionLoss(threshold=0.1, reduction='sum')"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weights": ()}, ValueError, r"`weights` holds no layer"),
        ({"weights": [None]}, TypeError, r"`weights\[0\]` must be a tensor, got NoneType"),
        ({"target_mask": torch.ones(4, 6)}, ValueError, r"`target_mask` must have shape \(batch, keys\) = \(4, 5\)"),
        ({"target_mask": MASK + 1}, ValueError, r"`target_mask` must lie between 0 and 1, got 2.0"),
        ({"target_mask": None}, TypeError, r"`target_mask` must be a tensor of shape \(batch, keys\) = \(4, 5\)"),
        ({"valid": torch.ones(2, 5)}, ValueError, r"`valid` must have shape \(batch, keys\) = \(4, 5\), got \(2, 5\)"),
        ({"threshold": 1.5}, ValueError, r"`threshold` must be a finite number, between 0 and 1, got 1.5"),
        ({"threshold": 1}, ValueError, r"`threshold` must be below 1, got 1: every row would be tolerated"),
        ({"reduction": "max"}, ValueError, r"`reduction` must be one of 'none', 'mean', 'sum', got 'max'"),
    ],
)
def test_checks(arguments, error, message):
    arguments = {"weights": attention(4, 2, 5, 5), "target_mask": MASK, **arguments}
    with pytest.raises(error, match=message):
        attention_suppression(**arguments)
    settings = {name: arguments[name] for name in ("threshold", "reduction") if name in arguments}
    if settings:
        with pytest.raises(error, match=message):
            AttentionSuppressionLoss(**settings)
