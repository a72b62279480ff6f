"""Attention entropy against plain numpy loops, its range, causal and padded rows, and the published regulariser."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

from losses.attention.entropy import AttentionEntropyLoss, attention_entropy

MODES = ["raise", "lower", "ear"]
VALID = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 1, 1], [0, 0, 1, 0, 0]]).bool()
CAUSAL = torch.ones(1, 1, 5, 5).tril().bool()


def attention(*shape, seed=0, dtype=torch.float32, mask=None):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(*shape, generator=generator, dtype=dtype)
    return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(dim=-1)


def reference(layers, valid, mode, reduction):
    """The definition, one row at a time, in float64."""
    batch, keys = layers[0].shape[0], layers[0].shape[3]
    values, counted = np.zeros(batch), np.zeros(batch, bool)
    for sample in range(batch):
        by_layer = []
        for layer in layers:
            costs = []
            for head in range(layer.shape[1]):
                for row in range(layer.shape[2]):
                    if valid is None:
                        allowed = list(range(keys))
                    elif valid.dim() == 4:
                        pairs = valid.expand(batch, layer.shape[1], -1, -1)[sample, head, row]
                        allowed = [key for key in range(keys) if pairs[key]]
                    else:
                        allowed = [key for key in range(keys) if valid[sample, key]]
                        if layer.shape[2] == keys and row not in allowed:
                            continue
                    weights = [float(layer[sample, head, row, key]) for key in allowed]
                    if len(allowed) < 2 or sum(weights) < 1e-6:
                        continue
                    shares = [weight / sum(weights) for weight in weights]
                    entropy = -sum(share * math.log(share) for share in shares if share > 0) / math.log(len(allowed))
                    costs.append(1 - entropy if mode == "raise" else entropy)
            if costs:
                by_layer.append(np.mean(costs))
        if by_layer:
            values[sample], counted[sample] = np.mean(by_layer), True
    return {"none": values, "sum": values.sum(), "mean": values.sum() / max(counted.sum(), 1)}[reduction]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("mode", ["raise", "lower"])
@pytest.mark.parametrize("valid", [VALID, None], ids=["padded", "all"])
def test_against_loops(valid, mode, reduction):
    layers = [attention(4, 3, 5, 5), attention(4, 2, 5, 5, seed=1), attention(4, 1, 3, 5, seed=2)]
    layers[0][0, :, 2] = 0  # a row that may attend to nothing
    layers[1][1, 0, 1] = torch.eye(5)[0]
    given = attention_entropy(layers, valid, mode=mode, reduction=reduction)
    np.testing.assert_allclose(given.numpy(), reference(layers, valid, mode, reduction), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["raise", "lower"])
@pytest.mark.parametrize("valid", [CAUSAL, CAUSAL & VALID[:, None, None], CAUSAL.expand(1, 2, 5, 5)])
def test_masks_of_pairs_against_loops(valid, mode):
    layers = [torch.nan_to_num(attention(4, 2, 5, 5, seed=seed, mask=valid)) for seed in range(2)]
    for reduction in ("mean", "none"):
        given = attention_entropy(layers, valid, mode=mode, reduction=reduction)
        np.testing.assert_allclose(given.numpy(), reference(layers, valid, mode, reduction), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("keys", [2, 17, 500])
def test_range_does_not_depend_on_the_length(keys):
    uniform, one_hot = torch.full((1, 2, 3, keys), 1 / keys), torch.eye(keys)[:1].expand(1, 2, 3, keys)
    assert attention_entropy(uniform).item() == pytest.approx(0.0, abs=1e-6)
    assert attention_entropy(uniform, mode="lower").item() == pytest.approx(1.0, abs=1e-6)
    assert attention_entropy(one_hot).item() == 1.0
    assert attention_entropy(one_hot, mode="lower").item() == 0.0


def test_uniform_causal_attention_costs_nothing():
    weights = CAUSAL.float() / CAUSAL.sum(-1, keepdim=True)
    assert attention_entropy(weights, CAUSAL).item() == pytest.approx(0.0, abs=1e-6)
    assert attention_entropy(weights).item() > 0.2  # without the mask, early rows look too sharp


def test_a_row_with_one_allowed_key_has_no_choice():
    weights = attention(2, 2, 5, 5, mask=CAUSAL)
    other = weights.clone()
    other[:, :, 0, 0] = 0.3
    torch.testing.assert_close(attention_entropy(other, CAUSAL), attention_entropy(weights, CAUSAL))
    alone = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    torch.testing.assert_close(attention_entropy(weights, alone), attention_entropy(weights[1:]))


def published(inputs, attention_mask):
    """Attanasio et al.: pool heads, drop padded rows and columns, softmax again, sum over layers, mean over samples."""
    samples = []
    for sample in range(len(attention_mask)):
        keep = np.flatnonzero(attention_mask[sample])
        total = 0.0
        for layer in inputs:
            pooled = layer[sample].mean(axis=0)[np.ix_(keep, keep)].astype(np.float64)
            shares = np.exp(pooled) / np.exp(pooled).sum(axis=-1, keepdims=True)
            total += (shares * np.log(shares)).sum(axis=-1).mean()
        samples.append(total)
    return np.array(samples)


def test_ear_is_the_published_one():
    layers = [attention(3, 4, 5, 5, seed=seed) for seed in range(3)]
    expected = published([layer.numpy() for layer in layers], VALID[:3].numpy())
    given = attention_entropy(layers, VALID[:3], mode="ear", reduction="none")
    np.testing.assert_allclose(given.numpy(), expected, rtol=1e-5)
    assert attention_entropy(layers, VALID[:3], mode="ear").item() == pytest.approx(expected.mean(), rel=1e-5)
    whole = published([layer.numpy() for layer in layers], np.ones((3, 5)))
    assert attention_entropy(layers, mode="ear").item() == pytest.approx(whole.mean(), rel=1e-5)


@pytest.mark.parametrize(("keys", "span"), [(16, 1.9), (64, 0.4), (128, 0.2)])
def test_the_second_softmax_of_ear_squeezes_the_range(keys, span):
    one_hot = torch.eye(keys)[:1].expand(1, 1, keys, keys)
    uniform = torch.full((1, 1, keys, keys), 1 / keys)
    ear = attention_entropy(one_hot, mode="ear") - attention_entropy(uniform, mode="ear")
    assert 100 * ear.item() / math.log(keys) == pytest.approx(span, abs=0.05)
    assert (attention_entropy(one_hot) - attention_entropy(uniform)).item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("empty", ["valid", "batch"])
def test_nothing_to_count_is_a_finite_zero_with_a_gradient(empty, reduction, mode):
    weights = attention(0 if empty == "batch" else 2, 2, 3, 3).requires_grad_()
    valid = torch.zeros(len(weights), 3) if empty == "valid" else None
    loss = attention_entropy(weights, valid, mode=mode, reduction=reduction)
    loss.sum().backward()
    assert loss.sum().item() == 0.0
    assert weights.grad.eq(0).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradients_stay_finite_at_exact_zeros(mode, dtype):
    weights = torch.eye(4, dtype=dtype).expand(1, 2, 4, 4).clone().requires_grad_()
    loss = attention_entropy([weights, weights * 0], mode=mode, reduction="sum")
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert weights.grad.isfinite().all()


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_padding_never_changes_the_loss(mode, data):
    batch, heads, keys, extra = (data.draw(st.integers(1, high)) for high in (3, 2, 6, 4))
    left = data.draw(st.integers(0, extra))
    weights = attention(batch, heads, keys, keys, seed=data.draw(st.integers(0, 99)))
    padded = torch.rand(batch, heads, keys + extra, keys + extra)
    inside = slice(left, left + keys)
    padded[:, :, inside, inside] = weights
    valid = torch.zeros(batch, keys + extra)
    valid[:, inside] = 1
    expected = attention_entropy(weights, mode=mode, reduction="none")
    given = attention_entropy(padded, valid, mode=mode, reduction="none")
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)
    if mode != "ear":
        pairs = (valid[:, None, :, None] * valid[:, None, None, :]).bool()
        by_pair = attention_entropy(padded, pairs, mode=mode, reduction="none")
        torch.testing.assert_close(by_pair, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("mode", "valid"), [(mode, valid) for mode in MODES for valid in ("none", "keys", "pairs")][:-1]
)  # the last, "ear" with pairs, is refused
def test_gradcheck_and_second_derivatives(mode, valid):
    masks = {"none": None, "keys": torch.tensor([[1, 1, 0], [1, 1, 1]]), "pairs": torch.ones(1, 1, 3, 3).tril()}
    scores = torch.randn(2, 2, 3, 3, dtype=torch.float64).requires_grad_()

    def loss(values):
        weights = values.softmax(dim=-1)
        return attention_entropy([weights, weights**2], masks[valid], mode=mode)

    assert torch.autograd.gradcheck(loss, (scores,))
    assert torch.autograd.gradgradcheck(loss, (scores,))


@pytest.mark.parametrize(("mode", "share"), [("raise", 0.99), ("lower", 0.1), ("ear", 0.99)])
def test_following_the_gradient(mode, share):
    scores = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    optimizer = torch.optim.Adam([scores], lr=0.2)
    for _ in range(60):
        optimizer.zero_grad()
        attention_entropy(scores.softmax(dim=-1), mode=mode).backward()
        optimizer.step()
    weights = scores.softmax(dim=-1)
    seen = weights.mean(dim=1, keepdim=True) if mode == "ear" else weights  # sharp heads that disagree satisfy it
    reached = attention_entropy(seen, mode="lower").item()
    assert reached < share if mode == "lower" else reached > share


@pytest.mark.parametrize("mode", ["lower", "ear"])
def test_autocast_changes_nothing(mode):
    weights = attention(2, 2, 40, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = attention_entropy(weights, mode=mode)
    torch.testing.assert_close(cast, attention_entropy(weights, mode=mode))


@pytest.mark.parametrize("mode", ["lower", "ear"])
def test_compiles_without_a_graph_break(mode):
    counter = CompileCounter()
    compiled = torch.compile(AttentionEntropyLoss(mode), backend=counter, fullgraph=True)
    for seed in range(3):
        weights = attention(4, 2, 5, 5, seed=seed)
        torch.testing.assert_close(compiled([weights], VALID), attention_entropy(weights, VALID, mode=mode))
    assert counter.frame_count == 1


def test_module_is_the_function():
    weights = attention(4, 2, 5, 5)
    module = AttentionEntropyLoss("lower", "sum")
    torch.testing.assert_close(
        module([weights], VALID), attention_entropy(weights, VALID, mode="lower", reduction="sum")
    )
    assert repr(module) == "AttentionEntropyLoss(mode='lower', reduction='sum')"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weights": ()}, ValueError, r"`weights` holds no layer"),
        ({"weights": [None]}, TypeError, r"`weights\[0\]` must be a tensor, got NoneType"),
        ({"valid": torch.ones(2, 5)}, ValueError, r"`valid` must have shape \(batch, keys\) = \(4, 5\), got \(2, 5\)"),
        (
            {"valid": torch.ones(4, 3, 5, 5)},
            ValueError,
            r"`valid` must have shape \(batch or 1, heads or 1, queries, keys\) = \(4, 2, 5, 5\), got \(4, 3, 5, 5\)",
        ),
        ({"valid": torch.ones(4, 1, 1, 5)}, ValueError, r"\(batch or 1, heads or 1, queries, keys\)"),
        ({"valid": CAUSAL, "mode": "ear"}, ValueError, r"`valid` must have shape \(batch, keys\) = \(4, 5\)"),
        ({"mode": "max"}, ValueError, r"`mode` must be one of 'raise', 'lower', 'ear', got 'max'"),
        ({"reduction": "max"}, ValueError, r"`reduction` must be one of 'none', 'mean', 'sum', got 'max'"),
    ],
)
def test_checks(arguments, error, message):
    arguments = {"weights": attention(4, 2, 5, 5), **arguments}
    with pytest.raises(error, match=message):
        attention_entropy(**arguments)


def test_module_checks_at_construction():
    for name in ("mode", "reduction"):
        with pytest.raises(ValueError, match=f"`{name}` must be one of"):
            AttentionEntropyLoss(**{name: "no"})
