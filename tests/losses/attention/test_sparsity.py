"""Attention sparsity against plain numpy loops, its range, and the L1 norm that a softmax makes constant."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

from losses.attention.sparsity import AttentionSparsityLoss, attention_sparsity

FORMS = ["hoyer", "l1"]
VALID = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 1, 1], [0, 0, 1, 0, 0]]).bool()
CAUSAL = torch.ones(1, 1, 5, 5).tril().bool()


def gates(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).sigmoid()


def row_cost(row, form):
    if form == "l1":
        return np.abs(row).mean()
    root = math.sqrt(len(row))
    return 1 - (root - np.abs(row).sum() / np.sqrt((row**2).sum())) / (root - 1)


def reference(layers, valid, form):
    """The definition, one row at a time, in float64; the cost of each sample that counts."""
    values = {}
    for sample in range(layers[0].shape[0]):
        by_layer = []
        for layer in layers:
            costs, square = [], layer.shape[2] == layer.shape[3]
            for head, query in np.ndindex(*layer.shape[1:3]):
                allowed = np.ones(layer.shape[3], bool)
                if valid is not None:
                    pairs = valid if valid.dim() == 4 else valid[:, None, None]
                    allowed = pairs.expand(layer.shape)[sample, head, query].numpy()
                    if valid.dim() == 2 and square and not valid[sample, query]:
                        continue
                row = layer[sample, head, query].double().numpy()[allowed]
                if len(row) > 1 and (form == "l1" or row.sum() > 1e-6):
                    costs.append(row_cost(row, form))
            if costs:
                by_layer.append(np.mean(costs))
        if by_layer:
            values[sample] = np.mean(by_layer)
    return values


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("valid", [None, VALID, CAUSAL], ids=["all", "padded", "causal"])
def test_against_loops(valid, form):
    layers = [gates(4, 3, 5, 5), gates(4, 2, 5, 5, seed=1)] + ([] if valid is CAUSAL else [gates(4, 1, 3, 5, seed=2)])
    layers[0][0, :, 2] = 0
    expected = reference(layers, valid, form)
    every = np.array([expected.get(sample, 0.0) for sample in range(4)])
    given = attention_sparsity(layers, valid, form=form, reduction="none")
    np.testing.assert_allclose(given.numpy(), every, rtol=2e-5, atol=1e-6)
    assert attention_sparsity(layers, valid, form=form, reduction="sum").item() == pytest.approx(every.sum(), rel=1e-5)
    mean = attention_sparsity(layers, valid, form=form)
    assert mean.item() == pytest.approx(np.mean(list(expected.values())), rel=1e-5)


@pytest.mark.parametrize("keys", [2, 17, 500])
@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_hoyer_runs_from_one_key_to_uniform_at_any_length_and_scale(keys, scale):
    uniform, one_hot = torch.full((1, 2, 3, keys), 1 / keys), torch.eye(keys)[:1].expand(1, 2, 3, keys)
    assert attention_sparsity(uniform * scale).item() == pytest.approx(1.0, abs=1e-5)
    assert attention_sparsity(one_hot * scale).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_l1_refuses_rows_after_a_softmax(dtype):
    weights = torch.randn(2, 3, 50, 50).softmax(dim=-1).to(dtype)
    with pytest.raises(ValueError, match=r"got rows that all sum to one, as after a softmax.*Use `form=\"hoyer\"`"):
        attention_sparsity(weights, form="l1")
    with pytest.raises(ValueError, match="rows that all sum to one"):
        AttentionSparsityLoss("l1")([gates(2, 3, 50, 50).to(dtype), weights])
    padded = torch.zeros(2, 3, 52, 52, dtype=dtype)
    padded[:, :, :50, :50] = weights
    with pytest.raises(ValueError, match="rows that all sum to one"):
        attention_sparsity(padded, (torch.arange(52) < 50).expand(2, 52), form="l1")
    assert attention_sparsity(gates(2, 3, 50, 50).to(dtype), form="l1").item() == pytest.approx(0.5, abs=0.02)


def test_the_l1_norm_of_a_softmax_would_train_nothing():
    scores = torch.randn(1, 1, 4, 4).requires_grad_()
    scores.softmax(dim=-1).abs().mean().backward()
    assert scores.grad.abs().max() < 1e-7
    attention_sparsity(scores.softmax(dim=-1)).backward()
    assert scores.grad.abs().max() > 1e-3


def test_l1_takes_signed_weights():
    weights = torch.randn(2, 2, 3, 4).requires_grad_()
    loss = attention_sparsity(weights, form="l1")
    loss.backward()
    torch.testing.assert_close(loss, weights.abs().mean())
    torch.testing.assert_close(weights.grad, weights.sign() / weights.numel())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("empty", ["valid", "rows", "batch"])
def test_nothing_to_count_is_a_finite_zero_with_a_gradient(empty, reduction, form):
    weights = (gates(0 if empty == "batch" else 2, 2, 3, 3) * (empty != "rows")).requires_grad_()
    valid = torch.zeros(len(weights), 3) if empty == "valid" else None
    loss = attention_sparsity(weights, valid, form=form, reduction=reduction)
    loss.sum().backward()
    assert loss.sum().item() == 0.0
    assert weights.grad.eq(0).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradients_stay_finite_at_exact_zeros(form, dtype):
    weights = (torch.eye(4, dtype=dtype) / 2).expand(1, 2, 4, 4).clone().requires_grad_()
    loss = attention_sparsity([weights, weights * 0], form=form, reduction="sum")
    loss.backward()
    assert loss.dtype == torch.float32
    assert weights.grad.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_padding_never_changes_the_loss(form, data):
    batch, heads, keys, extra = (data.draw(st.integers(1, high)) for high in (3, 2, 6, 4))
    left = data.draw(st.integers(0, extra))
    weights = gates(batch, heads, keys, keys, seed=data.draw(st.integers(0, 99)))
    padded = torch.rand(batch, heads, keys + extra, keys + extra)
    inside = slice(left, left + keys)
    padded[:, :, inside, inside] = weights
    valid = torch.zeros(batch, keys + extra)
    valid[:, inside] = 1
    expected = attention_sparsity(weights, form=form, reduction="none")
    given = attention_sparsity(padded, valid, form=form, reduction="none")
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("valid", ["none", "keys", "pairs"])
def test_gradcheck_and_second_derivatives(form, valid):
    masks = {"none": None, "keys": torch.tensor([[1, 1, 0], [1, 1, 1]]), "pairs": torch.ones(1, 1, 3, 3).tril()}
    scores = torch.randn(2, 2, 3, 3, dtype=torch.float64).requires_grad_()

    def loss(values):
        return attention_sparsity([values.sigmoid(), values.sigmoid() ** 2], masks[valid], form=form)

    assert torch.autograd.gradcheck(loss, (scores,))
    assert torch.autograd.gradgradcheck(loss, (scores,))


def test_following_the_gradient_leaves_few_keys():
    scores = torch.randn(1, 1, 3, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    optimizer = torch.optim.Adam([scores], lr=0.3)
    for _ in range(60):
        optimizer.zero_grad()
        attention_sparsity(scores.softmax(dim=-1)).backward()
        optimizer.step()
    assert scores.softmax(dim=-1).amax(dim=-1).min() > 0.95


def test_l1_compiles_without_a_graph_break():
    counter = CompileCounter()
    compiled = torch.compile(AttentionSparsityLoss("l1"), backend=counter, fullgraph=True)
    for seed in range(3):
        weights = gates(4, 2, 5, 5, seed=seed)
        torch.testing.assert_close(compiled([weights], VALID), attention_sparsity(weights, VALID, form="l1"))
    assert counter.frame_count == 1


def test_module_is_the_function():
    weights = gates(4, 2, 5, 5)
    module = AttentionSparsityLoss("l1", "sum")
    torch.testing.assert_close(module([weights], VALID), attention_sparsity(weights, VALID, form="l1", reduction="sum"))
    assert repr(module) == "AttentionSparsityLoss(form='l1', reduction='sum')"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weights": ()}, ValueError, r"`weights` holds no layer"),
        ({"weights": [None]}, TypeError, r"`weights\[0\]` must be a tensor, got NoneType"),
        ({"valid": torch.ones(2, 5)}, ValueError, r"`valid` must have shape \(batch, keys\) = \(4, 5\), got \(2, 5\)"),
        ({"valid": torch.ones(3, 1, 5, 5)}, ValueError, r"\(batch or 1, heads or 1, queries, keys\) = \(4, 2, 5, 5\)"),
        ({"form": "l2"}, ValueError, r"`form` must be one of 'hoyer', 'l1', got 'l2'"),
        ({"reduction": "max"}, ValueError, r"`reduction` must be one of 'none', 'mean', 'sum', got 'max'"),
    ],
)
def test_checks(arguments, error, message):
    arguments = {"weights": gates(4, 2, 5, 5), **arguments}
    with pytest.raises(error, match=message):
        attention_sparsity(**arguments)


def test_module_checks_at_construction():
    for name in ("form", "reduction"):
        with pytest.raises(ValueError, match=f"`{name}` must be one of"):
            AttentionSparsityLoss(**{name: "no"})
