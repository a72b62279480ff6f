"""Head disagreement against pairs of heads in plain numpy, and what its pairs of a head with itself do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losses.attention.disagreement import HeadDisagreementLoss, head_disagreement


def attention(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype).softmax(dim=-1)


def vectors(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reference(layers, valid, of, self_pairs, reduction):
    """Every pair of heads in every row or token, in float64."""
    samples = []
    for sample in range(layers[0].shape[0]):
        by_layer = []
        for layer in layers:
            x = layer[sample].double().numpy()
            heads, rows, width = x.shape
            real = np.ones(width if of == "attention" else rows, bool) if valid is None else valid[sample].numpy() != 0
            if of != "attention" or (rows == width and valid is not None):
                used = [row for row in range(rows) if real[row]]
            else:
                used = list(range(rows))
            costs = []
            for row in used:
                pairs = []
                for i in range(heads):
                    for j in range(heads):
                        if i == j and not self_pairs:
                            continue
                        if of == "attention":
                            pairs.append(sum(x[i, row, k] * x[j, row, k] for k in range(width) if real[k]))
                        else:
                            norms = np.linalg.norm(x[i, row]) * np.linalg.norm(x[j, row])
                            pairs.append(x[i, row] @ x[j, row] / norms)
                if of == "attention" and sum(x[:, row][:, real].ravel()) < 1e-6:
                    continue
                costs.append(np.mean(pairs) if pairs else 0.0)
            if costs:
                by_layer.append(np.mean(costs))
        samples.append(np.mean(by_layer) if by_layer else None)
    counted = [value for value in samples if value is not None]
    every = np.array([0.0 if value is None else value for value in samples])
    return {"mean": np.mean(counted), "sum": every.sum(), "none": every}[reduction]


VALID = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("self_pairs", [True, False])
@pytest.mark.parametrize("valid", [VALID, None], ids=["padded", "full"])
def test_attention_against_pairs_of_heads(valid, self_pairs, reduction):
    layers = [attention(4, 3, 5, 5), attention(4, 2, 5, 5, seed=1), attention(4, 4, 3, 5, seed=2)]
    layers[0][0, :, 2] = 0  # a row that may attend to nothing
    given_ = head_disagreement(layers, valid, self_pairs=self_pairs, reduction=reduction)
    expected = reference(layers, valid, "attention", self_pairs, reduction)
    np.testing.assert_allclose(given_.numpy(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("of", ["values", "outputs"])
@pytest.mark.parametrize("self_pairs", [True, False])
@pytest.mark.parametrize("valid", [VALID, None], ids=["padded", "full"])
def test_vectors_against_pairs_of_heads(valid, self_pairs, of):
    layers = [vectors(4, 3, 5, 6), vectors(4, 2, 5, 6, seed=1) * 100]
    for reduction in ("mean", "sum", "none"):
        measured = head_disagreement(layers, valid, of=of, self_pairs=self_pairs, reduction=reduction)
        expected = reference(layers, valid, of, self_pairs, reduction)
        np.testing.assert_allclose(measured.numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("heads", [1, 2, 5])
def test_ends_of_the_scale(heads):
    same = torch.eye(6)[:1].expand(1, heads, 4, 6)  # every head looks at key 0
    assert head_disagreement(same).item() == pytest.approx(1.0)
    apart = torch.eye(6)[:heads].reshape(1, heads, 1, 6)
    assert head_disagreement(apart).item() == pytest.approx(1 / heads)
    assert head_disagreement(apart, self_pairs=False).item() == pytest.approx(0.0, abs=1e-7)
    uniform = torch.full((1, heads, 4, 6), 1 / 6)
    assert head_disagreement(uniform).item() == pytest.approx(1 / 6)


def test_without_self_pairs_opposite_vectors_disagree_fully():
    pair = torch.tensor([[1.0, 2.0], [-2.0, -4.0]]).reshape(1, 2, 1, 2)
    assert head_disagreement(pair, of="values", self_pairs=False).item() == pytest.approx(-1.0)
    assert head_disagreement(pair, of="values").item() == pytest.approx(0.0, abs=1e-7)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 4),
    tokens=st.integers(1, 5),
    padding=st.integers(0, 3),
    self_pairs=st.booleans(),
    of=st.sampled_from(["attention", "values"]),
    seed=st.integers(0, 99),
)
def test_padding_changes_nothing(batch, heads, tokens, padding, self_pairs, of, seed):
    width = tokens + padding
    valid = (torch.arange(width) < tokens).expand(batch, width)
    if of == "attention":
        plain = attention(batch, heads, tokens, tokens, seed=seed)
        padded = torch.full((batch, heads, width, width), 0.7)  # what stands on padding must not matter
        padded[..., :tokens, :tokens] = plain
    else:
        plain = vectors(batch, heads, tokens, 3, seed=seed)
        padded = torch.cat([plain, torch.ones(batch, heads, padding, 3)], dim=2)
    expected = head_disagreement(plain, of=of, self_pairs=self_pairs)
    measured = head_disagreement(padded, valid, of=of, self_pairs=self_pairs)
    torch.testing.assert_close(measured, expected)
    assert measured.item() <= 1 + 1e-6


def test_self_pairs_flatten_heads_that_already_disagree():
    scores = torch.tensor([[4.0, 0.0, 0.0, 0.0], [0.0, 4.0, 0.0, 0.0]]).reshape(1, 2, 1, 4)
    pushes = {}
    for self_pairs in (True, False):
        leaf = scores.clone().requires_grad_()
        head_disagreement(leaf.softmax(dim=-1), self_pairs=self_pairs).backward()
        pushes[self_pairs] = leaf.grad[0, 0, 0, 0].item()
    assert pushes[True] > 0  # descent lowers the peak
    assert pushes[False] < 0  # descent sharpens it


@pytest.mark.parametrize("of", ["attention", "values"])
@pytest.mark.parametrize("self_pairs", [True, False])
def test_gradcheck(of, self_pairs):
    tensor = vectors(2, 3, 4, 4).double().requires_grad_()
    valid = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0]])

    def loss(x):
        x = x.softmax(dim=-1) if of == "attention" else x
        return head_disagreement([x, x.square()], valid, of=of, self_pairs=self_pairs)

    assert torch.autograd.gradcheck(loss, (tensor,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("of", ["values", "outputs"])
def test_a_dead_head_has_no_direction_and_no_gradient(of, dtype):
    tensor = vectors(1, 3, 4, 5).to(dtype)
    tensor[:, 1] = 0
    tensor[:, 2, 0] = torch.finfo(dtype).tiny
    tensor.requires_grad_()
    loss = head_disagreement(tensor, of=of, reduction="sum")
    loss.backward()
    assert loss.isfinite()
    assert tensor.grad.isfinite().all()
    assert tensor.grad[:, 1].eq(0).all()


def test_one_head_alone():
    weights = attention(2, 1, 3, 3).requires_grad_()
    assert head_disagreement(weights).isfinite()
    loss = head_disagreement(weights, self_pairs=False)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-7)
    assert weights.grad.isfinite().all()


@pytest.mark.parametrize("of", ["attention", "values"])
def test_minimising_drives_heads_apart(of):
    tensor = (torch.ones(1, 2, 1, 4) + 0.01 * vectors(1, 2, 1, 4)).requires_grad_()
    optimizer = torch.optim.Adam([tensor], lr=0.2)
    for _ in range(60):
        optimizer.zero_grad()
        weights = tensor.softmax(dim=-1) if of == "attention" else tensor
        head_disagreement(weights, of=of, self_pairs=False).backward()
        optimizer.step()
    assert head_disagreement(weights.detach(), of=of, self_pairs=False) < 0.05


@pytest.mark.parametrize("of", ["attention", "values"])
def test_nothing_valid_is_a_finite_zero_with_a_gradient(of):
    tensor = attention(2, 2, 3, 3).requires_grad_()
    loss = head_disagreement(tensor, torch.zeros(2, 3), of=of)
    loss.backward()
    assert loss.item() == 0.0
    assert tensor.grad.eq(0).all()


def test_module_is_the_function():
    weights = attention(4, 2, 5, 5)
    module = HeadDisagreementLoss("outputs", self_pairs=False, reduction="none")
    expected = head_disagreement(weights, VALID, of="outputs", self_pairs=False, reduction="none")
    torch.testing.assert_close(module(weights, VALID), expected)
    assert repr(module) == "HeadDisagreementLoss(of='outputs', self_pairs=False, reduction='none')"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weights": ()}, ValueError, "`weights` holds no layer"),
        ({"weights": [None]}, TypeError, r"`weights\[0\]` must be a tensor, got NoneType"),
        ({"weights": torch.ones(2, 3, 4)}, ValueError, r"`weights\[0\]` must have 4 axes"),
        ({"valid": torch.ones(4, 4)}, ValueError, r"`valid` must have shape \(batch, keys\) = \(4, 5\), got \(4, 4\)"),
        ({"valid": torch.ones(4, 5), "of": "values"}, ValueError, r"`valid` must have shape \(batch, tokens\)"),
        ({"of": "keys"}, ValueError, "`of` must be one of 'attention', 'values', 'outputs', got 'keys'"),
        ({"reduction": "max"}, ValueError, "`reduction` must be one of 'none', 'mean', 'sum', got 'max'"),
    ],
)
def test_checks(arguments, error, message):
    with pytest.raises(error, match=message):
        head_disagreement(**{"weights": attention(4, 2, 3, 5), **arguments})


def test_module_checks_at_construction():
    with pytest.raises(ValueError, match="`of` must be one of"):
        HeadDisagreementLoss("keys")
    with pytest.raises(ValueError, match="`reduction` must be one of"):
        HeadDisagreementLoss(reduction="max")
