"""Guided alignment against plain numpy loops, its two denominators, and its logarithm at zero."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from losses.attention.alignment import GuidedAlignmentLoss, guided_alignment


def attention(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype).softmax(dim=-1)


LINKS = torch.tensor(
    [
        [[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [0, 0, 1, 0, 0]],
        [[0, 0, 0, 0, 1], [0, 0.5, 1, 0, 0], [0, 0, 0, 0, 0]],
        [[0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]],
        [[0, 1, 0, 0, 0], [0, 1, 0, 0, 0], [1, 1, 1, 1, 0]],
    ]
)
VALID = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 1, 1], [1, 1, 1, 1, 0]]).bool()
QUERIES = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 0]]).bool()


def reference(layers, links, valid, query_valid, head, reduction):
    """The definition, one link at a time, in float64."""
    samples = []
    for sample in range(links.shape[0]):
        keys = [key for key in range(links.shape[2]) if valid is None or valid[sample, key]]
        queries = [row for row in range(links.shape[1]) if query_valid is None or query_valid[sample, row]]
        gold = {row: {key: float(links[sample, row, key]) for key in keys} for row in queries}
        linked = [row for row in queries if sum(gold[row].values()) > 0]
        if not linked:
            samples.append(None)
            continue
        by_layer = []
        for layer in layers:
            heads = range(layer.shape[1]) if head is None else [head]
            by_head = []
            for index in heads:
                total = 0.0
                for row in linked:
                    a = {key: float(layer[sample, index, row, key]) for key in keys}
                    for key in keys:
                        share = gold[row][key] / sum(gold[row].values())
                        if share > 0:
                            total -= share * math.log(a[key] / sum(a.values()))
                by_head.append(total / len(linked if query_valid is None else queries))
            by_layer.append(np.mean(by_head))
        samples.append(np.mean(by_layer))
    counted = [value for value in samples if value is not None]
    every = np.array([0.0 if value is None else value for value in samples])
    return {"mean": np.mean(counted), "sum": every.sum(), "none": every}[reduction]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("head", [None, 1])
@pytest.mark.parametrize("valid", [VALID, None], ids=["padded", "full"])
@pytest.mark.parametrize("query_valid", [QUERIES, None], ids=["queries", "links"])
def test_against_loops(query_valid, valid, head, reduction):
    layers = [attention(4, 3, 3, 5), attention(4, 2, 3, 5, seed=1)]
    loss = guided_alignment(layers, LINKS, valid, head=head, query_valid=query_valid, reduction=reduction)
    expected = reference(layers, LINKS, valid, query_valid, head, reduction)
    np.testing.assert_allclose(loss.numpy(), expected, rtol=1e-5)


def test_one_link_a_row_is_cross_entropy():
    scores = torch.randn(2, 1, 4, 6, generator=torch.Generator().manual_seed(3))
    target = torch.tensor([[0, 1, 2, 3], [5, 5, 0, 1]])
    loss = guided_alignment(scores.softmax(dim=-1), F.one_hot(target, 6))
    torch.testing.assert_close(loss, F.cross_entropy(scores[:, 0].flatten(0, 1), target.flatten()))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    queries=st.integers(1, 5),
    keys=st.integers(1, 5),
    more_queries=st.integers(0, 3),
    more_keys=st.integers(0, 3),
    told=st.booleans(),
    seed=st.integers(0, 99),
)
def test_padding_cannot_dilute_the_loss(queries, keys, more_queries, more_keys, told, seed):
    plain = attention(2, 2, queries, keys, seed=seed)
    links = torch.rand(2, queries, keys, generator=torch.Generator().manual_seed(seed)).round()
    weights = torch.full((2, 2, queries + more_queries, keys + more_keys), 0.3)
    weights[:, :, :queries, :keys] = plain
    wide = torch.zeros(2, *weights.shape[2:])
    wide[:, :queries, :keys] = links
    wide[:, :, keys:] = 1.0  # links to padding are no links
    valid = (torch.arange(keys + more_keys) < keys).expand(2, -1)
    real = torch.arange(queries + more_queries) < queries
    given_, kept = (real.expand(2, -1), real[:queries].expand(2, -1)) if told else (None, None)
    expected = guided_alignment(plain, links, query_valid=kept)
    torch.testing.assert_close(guided_alignment(weights, wide, valid, query_valid=given_), expected)


def test_source_padding_says_nothing_about_as_many_queries():
    weights, links = attention(1, 1, 3, 3), torch.tensor([[[1, 0, 0], [1, 0, 0], [0, 1, 0]]])
    valid = torch.tensor([[1, 1, 0]])
    shares = weights[0, 0, :, :2] / weights[0, 0, :, :2].sum(dim=-1, keepdim=True)
    expected = -(shares[0, 0].log() + shares[1, 0].log() + shares[2, 1].log()) / 3
    torch.testing.assert_close(guided_alignment(weights, links, valid), expected)


def test_real_queries_without_a_link_lower_the_papers_mean_only():
    weights, links = attention(1, 2, 4, 5), torch.zeros(1, 4, 5)
    links[0, 0, 2] = 1
    by_links = guided_alignment(weights, links)
    by_queries = guided_alignment(weights, links, query_valid=torch.ones(1, 4))
    torch.testing.assert_close(by_links, 4 * by_queries)


def test_a_head_index_guides_that_head_only():
    weights = attention(4, 3, 3, 5).requires_grad_()
    guided_alignment(weights, LINKS, head=2).backward()
    assert weights.grad[:, :2].eq(0).all()
    assert weights.grad[:, 2].ne(0).any()


def test_samples_without_links_leave_the_mean():
    weights = attention(4, 3, 3, 5)
    some = torch.tensor([0, 1, 3])
    torch.testing.assert_close(guided_alignment(weights, LINKS), guided_alignment(weights[some], LINKS[some]))
    real = torch.ones(4, 3)
    torch.testing.assert_close(
        guided_alignment(weights, LINKS, query_valid=real),
        guided_alignment(weights[some], LINKS[some], query_valid=real[some]),
    )


def test_samples_whose_only_links_lie_on_padded_queries_leave_the_mean():
    weights, links = attention(2, 2, 3, 5), torch.zeros(2, 3, 5)
    links[0, 0, 1] = links[1, 2, 1] = 1
    real = torch.tensor([[1, 1, 1], [1, 1, 0]])
    loss = guided_alignment(weights, links, query_valid=real)
    torch.testing.assert_close(loss, guided_alignment(weights[:1], links[:1], query_valid=real[:1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_weights_on_links_are_finite_and_still_pull(dtype):
    weights = torch.eye(4, dtype=dtype)[None, None].clone().requires_grad_()
    links = torch.ones(1, 4, 4) - torch.eye(4)
    loss = guided_alignment(weights, links, reduction="sum")
    loss.backward()
    assert loss.isfinite()
    assert loss.dtype == torch.float32
    assert weights.grad.isfinite().all()
    assert weights.grad[0, 0, 0, 1] < -80  # strongest where the link is missed, not cut off


def test_perfect_alignment_costs_nothing():
    weights = torch.eye(4)[None, None]
    assert guided_alignment(weights, torch.eye(4)[None]).item() == 0.0


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_gradients(check):
    scores = torch.randn(4, 2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def loss(x):
        weights = x.softmax(dim=-1)
        return guided_alignment([weights, weights**2], LINKS, VALID, query_valid=QUERIES)

    assert check(loss, (scores,))


@pytest.mark.parametrize("empty", ["links", "valid", "queries", "weights", "batch"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_to_align_is_a_finite_zero_with_a_gradient(empty, reduction):
    batch = 0 if empty == "batch" else 4
    weights = (attention(batch, 2, 3, 5) * (empty != "weights")).requires_grad_()
    links = LINKS[:batch] * (empty != "links")
    valid = torch.zeros(batch, 5) if empty == "valid" else None
    query_valid = torch.zeros(batch, 3) if empty == "queries" else None
    loss = guided_alignment(weights, links, valid, query_valid=query_valid, reduction=reduction).sum()
    loss.backward()
    assert loss.item() == 0.0
    assert weights.grad.eq(0).all()


def test_following_the_gradient_aligns():
    scores, links = torch.zeros(1, 1, 3, 4, requires_grad=True), torch.eye(4)[None, :3]
    optimizer = torch.optim.Adam([scores], lr=0.3)
    for _ in range(40):
        optimizer.zero_grad()
        guided_alignment(scores.softmax(dim=-1), links).backward()
        optimizer.step()
    assert (scores.softmax(dim=-1)[0, 0] * links[0]).sum(dim=-1).min() > 0.9


def test_module_is_the_function():
    weights = attention(4, 3, 3, 5)
    module = GuidedAlignmentLoss(1, reduction="none")
    expected = guided_alignment(weights, LINKS, VALID, head=1, query_valid=QUERIES, reduction="none")
    torch.testing.assert_close(module(weights, LINKS, VALID, query_valid=QUERIES), expected)
    assert repr(module) == "GuidedAlignmentLoss(head=1, reduction='none')"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weights": ()}, ValueError, "`weights` holds no layer"),
        ({"target_mask": LINKS[0]}, ValueError, r"`target_mask` must have shape \(batch, queries, keys\)"),
        ({"target_mask": LINKS * 2}, ValueError, "`target_mask` must lie between 0 and 1, got 2"),
        ({"valid": torch.ones(4, 3)}, ValueError, r"`valid` must have shape \(batch, keys\) = \(4, 5\)"),
        (
            {"query_valid": torch.ones(4, 5)},
            ValueError,
            r"`query_valid` must have shape \(batch, queries\) of `weights\[0\]` = \(4, 3\)",
        ),
        (
            {"weights": [attention(4, 2, 3, 5), attention(4, 2, 4, 5)]},
            ValueError,
            r"`target_mask` must have shape .* of `weights\[1\]`",
        ),
        ({"head": 2}, ValueError, r"`head` must be between 0 and 1, since `weights\[0\]` has 2 heads, got 2"),
        ({"head": -1}, ValueError, "`head` must be at least 0, got -1"),
        ({"head": True}, TypeError, "`head` must be the index of a head, or None for every head, got True"),
        ({"reduction": "max"}, ValueError, "`reduction` must be one of 'none', 'mean', 'sum', got 'max'"),
    ],
)
def test_checks(arguments, error, message):
    with pytest.raises(error, match=message):
        guided_alignment(**{"weights": attention(4, 2, 3, 5), "target_mask": LINKS, **arguments})


def test_module_checks_at_construction():
    with pytest.raises(ValueError, match="`head` must be at least 0, got -1"):
        GuidedAlignmentLoss(-1)
    with pytest.raises(ValueError, match="`reduction` must be one of"):
        GuidedAlignmentLoss(reduction="max")
