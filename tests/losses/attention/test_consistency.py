"""Attention consistency against another form of the divergence in plain numpy, and its gradients at exact zeros."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losses.attention.consistency import AttentionConsistencyLoss, attention_consistency


def attention(*shape, seed=0, dtype=torch.float32, sharp=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (sharp * torch.randn(*shape, generator=generator, dtype=dtype)).softmax(dim=-1)


def entropy(distribution):
    return -sum(value * np.log2(value) for value in distribution if value > 0)


def reference(layers, others, valid, reduction):
    """Entropy of the middle minus the mean entropy, row by row: another form of the divergence."""
    samples = []
    for sample in range(layers[0].shape[0]):
        by_layer = []
        for layer, other in zip(layers, others, strict=True):
            keys = [k for k in range(layer.shape[3]) if valid is None or valid[sample, k]]
            square = layer.shape[2] == layer.shape[3]
            rows = [r for r in range(layer.shape[2]) if valid is None or not square or valid[sample, r]]
            costs = []
            for head in range(layer.shape[1]):
                for row in rows:
                    p, q = (x[sample, head, row].double().numpy()[keys] for x in (layer, other))
                    if p.sum() < 1e-6 or q.sum() < 1e-6:
                        continue
                    p, q = p / p.sum(), q / q.sum()
                    costs.append(entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2)
            if costs:
                by_layer.append(np.mean(costs))
        samples.append(np.mean(by_layer) if by_layer else None)
    counted = [value for value in samples if value is not None]
    every = np.array([0.0 if value is None else value for value in samples])
    return {"mean": np.mean(counted), "sum": every.sum(), "none": every}[reduction]


VALID = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("valid", [VALID, None], ids=["padded", "full"])
def test_against_loops(valid, reduction):
    layers = [attention(4, 3, 5, 5), attention(4, 2, 3, 5, seed=1)]
    others = [attention(4, 3, 5, 5, seed=2, sharp=3), attention(4, 2, 3, 5, seed=3)]
    layers[0][0, :, 2] = 0  # a row that may attend to nothing, in one view only
    others[1][1, :, 0] = 0  # and in the other
    loss = attention_consistency(layers, others, valid, reduction=reduction)
    np.testing.assert_allclose(loss.numpy(), reference(layers, others, valid, reduction), rtol=1e-4, atol=1e-6)


def test_ends_of_the_scale():
    weights = attention(2, 3, 4, 6)
    assert attention_consistency(weights, weights).item() == 0.0
    first, second = torch.eye(4)[None, None], torch.eye(4).roll(1, 0)[None, None]
    assert attention_consistency(first, second).item() == pytest.approx(1.0)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 5),
    padding=st.integers(0, 3),
    sharp=st.sampled_from([0.1, 1.0, 30.0]),
    seed=st.integers(0, 99),
)
def test_padding_and_order_change_nothing(tokens, padding, sharp, seed):
    first, second = (attention(2, 2, tokens, tokens, seed=seed + i, sharp=sharp) for i in range(2))
    expected = attention_consistency(first, second)
    wide = [torch.full((2, 2, tokens + padding, tokens + padding), fill) for fill in (0.2, 0.6)]
    for whole, part in zip(wide, (first, second), strict=True):
        whole[:, :, :tokens, :tokens] = part
    valid = (torch.arange(tokens + padding) < tokens).expand(2, -1)
    torch.testing.assert_close(attention_consistency(*wide, valid), expected)
    torch.testing.assert_close(attention_consistency(second, first), expected)
    assert -1e-6 <= expected.item() <= 1 + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_stay_finite_at_exact_zeros(dtype):
    first = torch.eye(4, dtype=dtype)[None, None].clone().requires_grad_()
    second = torch.eye(4, dtype=dtype).roll(1, 0)[None, None].clone().requires_grad_()
    loss = attention_consistency(first, second, reduction="sum")
    loss.backward()
    assert loss.dtype == torch.float32
    for view in (first, second):
        assert view.grad.isfinite().all()
        assert view.grad.ne(0).any()


def test_the_gradient_goes_to_both_views_unless_one_is_detached():
    first, second = attention(2, 2, 3, 3).requires_grad_(), attention(2, 2, 3, 3, seed=1).requires_grad_()
    attention_consistency(first, second).backward()
    assert first.grad.ne(0).any()
    assert second.grad.ne(0).any()
    second.grad = None
    attention_consistency(first, second.detach()).backward()
    assert second.grad is None


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_gradients(check):
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(2, 2, 3, 3, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2)]
    valid = torch.tensor([[1, 1, 1], [0, 1, 1]])
    assert check(lambda p, q: attention_consistency([p.softmax(-1) ** 2], [q.softmax(-1)], valid), scores)


@pytest.mark.parametrize("empty", ["valid", "weights", "batch"])
def test_nothing_to_compare_is_a_finite_zero_with_a_gradient(empty):
    batch = 0 if empty == "batch" else 2
    weights = (attention(batch, 2, 3, 3) * (empty != "weights")).requires_grad_()
    valid = torch.zeros(batch, 3) if empty == "valid" else None
    for reduction in ("mean", "sum", "none"):
        weights.grad = None
        loss = attention_consistency(weights, attention(batch, 2, 3, 3, seed=1), valid, reduction=reduction).sum()
        loss.backward()
        assert loss.item() == 0.0
        assert weights.grad.eq(0).all()


def test_module_is_the_function():
    views = attention(4, 2, 5, 5), attention(4, 2, 5, 5, seed=1)
    module = AttentionConsistencyLoss("none")
    torch.testing.assert_close(module(*views, VALID), attention_consistency(*views, VALID, reduction="none"))
    assert repr(module) == "AttentionConsistencyLoss(reduction='none')"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weights": ()}, ValueError, "`weights` holds no layer"),
        ({"other": ()}, ValueError, "`other` holds no layer"),
        ({"other": [attention(4, 2, 5, 5)] * 2}, ValueError, "`other` must have the 1 layers of `weights`, got 2"),
        ({"other": attention(4, 3, 5, 5)}, ValueError, r"`other\[0\]` must have shape of `weights\[0\]`"),
        ({"other": [None]}, TypeError, r"`other\[0\]` must be a tensor, got NoneType"),
        ({"valid": torch.ones(4, 4)}, ValueError, r"`valid` must have shape \(batch, keys\) = \(4, 5\)"),
        ({"reduction": "max"}, ValueError, "`reduction` must be one of 'none', 'mean', 'sum', got 'max'"),
    ],
)
def test_checks(arguments, error, message):
    with pytest.raises(error, match=message):
        attention_consistency(**{"weights": attention(4, 2, 5, 5), "other": attention(4, 2, 5, 5), **arguments})


def test_module_checks_at_construction():
    with pytest.raises(ValueError, match="`reduction` must be one of"):
        AttentionConsistencyLoss("max")
