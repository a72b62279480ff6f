"""Attention guidance against plain numpy loops, its promises about length and empty sets, and its gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

from losses import AttentionGuidedLoss, attention_guidance

DISTRIBUTION_FORMS = ["kl", "js", "iou"]
FORMS = ["mass", "log", *DISTRIBUTION_FORMS]


def attention(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype).softmax(dim=-1)


def row_cost(weights, degree, kind, form):
    """The cost of one row, from the weights and degrees of its real keys."""
    attention = {key: weight / sum(weights.values()) for key, weight in weights.items()}
    target = {key: part / sum(degree.values()) for key, part in degree.items()}
    if form == "kl":
        surplus = sum(part * math.log(part) for part in target.values() if part)
        uniform = surplus + math.log(len(target))
        cost = surplus - sum(part * math.log(attention[key]) for key, part in target.items() if part)
        return cost / uniform if uniform > 1e-4 else cost
    if form == "js":
        middle = {key: (attention[key] + target[key]) / 2 for key in target}
        sides = [
            (side[key] * math.log2(side[key] / middle[key]))
            for side in (attention, target)
            for key in target
            if side[key]
        ]
        return sum(sides) / 2
    if form == "iou":
        pairs = [(attention[key], target[key]) for key in target]
        return 1 - sum(map(min, pairs)) / sum(map(max, pairs))
    hit, uniform = sum(attention[key] * degree[key] for key in degree), sum(degree.values()) / len(degree)
    if kind == "suppress":
        hit, uniform = 1 - hit, 1 - uniform
    return 1 - hit if form == "mass" else math.log(hit) / math.log(uniform)


def reference(layers, target_mask, valid, spurious, form, queries, reduction):
    """The definition, one weight at a time, in float64."""
    batch, keys = layers[0].shape[0], layers[0].shape[3]
    valid = np.ones((batch, keys), bool) if valid is None else np.asarray(valid)
    terms = [(mask, kind) for mask, kind in ((target_mask, "reward"), (spurious, "suppress")) if mask is not None]
    total, mean = np.zeros(batch), 0.0
    for mask, kind in terms:
        values = []
        for sample in range(batch):
            real = [key for key in range(keys) if valid[sample, key]]
            degree = {key: float(mask[sample, key]) for key in real}
            if sum(degree.values()) == 0:
                continue
            by_layer = []
            for layer in layers:
                square = layer.shape[2] == keys
                rows = [row for row in range(layer.shape[2]) if not square or valid[sample, row]]
                costs = []
                for head in range(layer.shape[1]):
                    for row in rows[:1] if queries == "first" else rows:
                        weights = {key: float(layer[sample, head, row, key]) for key in real}
                        if sum(weights.values()) < 1e-6:
                            continue
                        costs.append(row_cost(weights, degree, kind, form))
                if costs:
                    by_layer.append(np.mean(costs))
            if by_layer:
                values.append(np.mean(by_layer))
                total[sample] += values[-1]
        mean += np.mean(values) if values else 0.0
    return {"mean": mean, "sum": total.sum(), "none": total}[reduction]


MASK = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0], [0, 1, 1, 0, 0]]).bool()
SPURIOUS = torch.tensor([[0, 0, 0.5, 0, 0], [1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 1.0]])
VALID = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 1, 1], [1, 1, 1, 1, 0]]).bool()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("queries", ["all", "first"])
@pytest.mark.parametrize("form", ["mass", "log"])
@pytest.mark.parametrize(("masks", "valid"), [("both", VALID), ("relevant", VALID), ("spurious", None)])
def test_against_loops(form, queries, reduction, masks, valid):
    layers = [attention(4, 3, 5, 5), attention(4, 2, 5, 5, seed=1), attention(4, 1, 3, 5, seed=2)]
    layers[0][0, :, 2] = 0  # a row that may attend to nothing
    target_mask = None if masks == "spurious" else MASK
    spurious = None if masks == "relevant" else SPURIOUS
    given = attention_guidance(
        layers, target_mask, valid, spurious=spurious, form=form, queries=queries, reduction=reduction
    )
    expected = reference(layers, target_mask, valid, spurious, form, queries, reduction)
    np.testing.assert_allclose(given.numpy(), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("queries", ["all", "first"])
@pytest.mark.parametrize("form", DISTRIBUTION_FORMS)
@pytest.mark.parametrize("valid", [VALID, None], ids=["padded", "all"])
def test_distances_from_a_distribution_against_loops(form, queries, reduction, valid):
    layers = [attention(4, 3, 5, 5), attention(4, 2, 5, 5, seed=1), attention(4, 1, 3, 5, seed=2)]
    layers[0][0, :, 2] = 0
    mask = torch.where(SPURIOUS > 0, SPURIOUS, MASK.float())  # degrees, several keys, an empty sample for good measure
    mask[2] = 0
    given = attention_guidance(layers, mask, valid, form=form, queries=queries, reduction=reduction)
    expected = reference(layers, mask, valid, None, form, queries, reduction)
    np.testing.assert_allclose(given.numpy(), expected, rtol=1e-4, atol=2e-4)  # up to the floor of 2 ** -20


@pytest.mark.parametrize("form", DISTRIBUTION_FORMS)
def test_distances_are_zero_at_the_target_only(form):
    mask = torch.tensor([[0.0, 1.0, 0.5, 0.5, 0.0, 1.0]])
    target = mask / mask.sum()
    at_target = attention_guidance(target.expand(1, 2, 3, 6), mask, form=form)
    assert at_target.item() == pytest.approx(0.0, abs=1e-6)
    half_way = 0.5 * target + 0.5 * target.roll(1)
    assert attention_guidance(half_way.expand(1, 2, 3, 6), mask, form=form).item() > 0.05
    mass_alone = torch.tensor([[0.0, 1.0, 0.0, 0.0, 0.0, 0.0]])
    assert attention_guidance(mass_alone.expand(1, 2, 3, 6), mask.ceil(), form="mass").item() == 0.0
    assert attention_guidance(mass_alone.expand(1, 2, 3, 6), mask.ceil(), form=form).item() > 0.3


@pytest.mark.parametrize("keys", [2, 17, 500])
def test_kl_form_is_one_for_uniform_attention_of_any_length(keys):
    weights = torch.full((1, 2, 3, keys), 1 / keys)
    mask = torch.arange(keys)[None] < max(1, keys // 7)
    assert attention_guidance(weights, mask, form="kl").item() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("keys", [3, 500])
def test_kl_to_a_uniform_target_is_not_divided_by_zero(keys):
    weights = attention(1, 2, 3, keys).double()
    cost = attention_guidance(weights, torch.ones(1, keys), form="kl")
    assert cost.item() == pytest.approx((-weights.log().mean(-1).mean() - math.log(keys)).item(), rel=1e-2)
    flat = torch.full((1, 1, 1, keys), 1 / keys)
    assert attention_guidance(flat, torch.ones(1, keys), form="kl").item() == pytest.approx(0.0, abs=1e-5)


def test_disjoint_supports_cost_one():
    weights = torch.eye(4)[[1, 1, 1, 1]][None, None]
    off = torch.tensor([[1, 0, 0, 0]])
    assert attention_guidance(weights, off, form="iou").item() == 1.0
    assert attention_guidance(weights, off, form="js").item() == pytest.approx(1.0, abs=1e-4)


def test_the_target_does_not_flatten_with_length():
    for keys in (8, 64, 512):  # HateXplain's softmax(5 r) peaks at .91 to .23 there, so a one-hot row would cost more
        one_hot = torch.eye(keys)[:1].expand(1, 1, keys, keys)
        for form in DISTRIBUTION_FORMS:
            assert attention_guidance(one_hot, torch.eye(keys)[:1], form=form).item() == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data())
def test_padding_never_changes_the_loss(form, data):
    batch, heads, keys, extra = (data.draw(st.integers(1, high)) for high in (3, 2, 6, 4))
    left = data.draw(st.integers(0, extra))
    mask = torch.tensor(
        data.draw(st.lists(st.lists(st.booleans(), min_size=keys, max_size=keys), min_size=batch, max_size=batch))
    )
    weights = attention(batch, heads, keys, keys, seed=data.draw(st.integers(0, 99)))
    padded = torch.rand(batch, heads, keys + extra, keys + extra)  # rows of padding, and weights on it, are arbitrary
    inside = slice(left, left + keys)
    padded[:, :, inside, inside] = weights
    wide, valid = torch.ones(batch, keys + extra), torch.zeros(batch, keys + extra)
    wide[:, inside], valid[:, inside] = mask.float(), 1
    for queries in ("all", "first"):
        expected = attention_guidance(weights, mask, form=form, queries=queries, reduction="none")
        given = attention_guidance(padded, wide, valid, form=form, queries=queries, reduction="none")
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("keys", [2, 17, 500])
def test_log_form_is_one_for_uniform_attention_of_any_length(keys):
    weights = torch.full((1, 2, 3, keys), 1 / keys)
    mask = torch.arange(keys)[None] < max(1, keys // 7)
    assert attention_guidance(weights, mask, form="log").item() == pytest.approx(1.0, abs=1e-5)
    assert attention_guidance(weights, spurious=mask, form="log").item() == pytest.approx(1.0, abs=1e-5)


def test_padding_does_not_change_the_loss():
    weights, mask = attention(2, 3, 6, 6), torch.tensor([[1, 0, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0]])
    padded = torch.zeros(2, 3, 9, 9)
    padded[:, :, :6, :6] = weights
    padded[:, :, 6:] = 1 / 9  # what padded queries do must not matter
    wide = torch.cat([mask, torch.ones(2, 3)], dim=1)
    valid = torch.arange(9).expand(2, 9) < 6
    for form in ("mass", "log"):
        torch.testing.assert_close(
            attention_guidance(padded, wide, valid, form=form), attention_guidance(weights, mask, form=form)
        )


@pytest.mark.parametrize("form", ["mass", "log"])
def test_best_and_worst_attention(form):
    weights = torch.eye(4)[[1, 1, 1, 1]][None, None]  # every row looks at key 1 only
    on, off = torch.tensor([[0, 1, 0, 0]]), torch.tensor([[1, 0, 0, 0]])
    assert attention_guidance(weights, on, form=form).item() == 0.0
    assert attention_guidance(weights, spurious=off, form=form).item() == 0.0
    worst = 1.0 if form == "mass" else 20 * math.log(2) / math.log(4)  # the floor under the logarithm, 2 ** -20
    assert attention_guidance(weights, off, form=form).item() == pytest.approx(worst, rel=1e-5)
    if form == "mass":
        assert attention_guidance(weights, spurious=on, form=form).item() == 1.0


def test_no_annotation_is_never_a_uniform_target():
    weights = attention(2, 2, 4, 4).requires_grad_()
    mask = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0]])
    loss = attention_guidance(weights, mask)
    loss.backward()
    assert weights.grad[0].eq(0).all()
    assert weights.grad[1].ne(0).any()
    alone = attention_guidance(weights[1:], mask[1:])
    torch.testing.assert_close(loss, alone)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("empty", ["relevance", "valid", "rows", "batch"])
def test_nothing_to_guide_is_a_finite_zero_with_a_gradient(form, reduction, empty):
    scale = 0.0 if empty == "rows" else 1.0
    weights = (attention(0 if empty == "batch" else 2, 2, 3, 3) * scale).requires_grad_()
    mask = torch.zeros(weights.shape[0], 3) if empty == "relevance" else torch.eye(3)[: weights.shape[0]]
    valid = torch.zeros(weights.shape[0], 3) if empty == "valid" else None
    spurious = None if form in DISTRIBUTION_FORMS else mask
    loss = attention_guidance(weights, mask, valid, spurious=spurious, form=form, reduction=reduction)
    loss.sum().backward()
    assert loss.sum().item() == 0.0
    assert weights.grad.eq(0).all()


@pytest.mark.parametrize("form", FORMS)
def test_gradients_stay_finite_at_exact_zeros(form):
    weights = torch.eye(4).expand(1, 2, 4, 4).clone().requires_grad_()  # causal and padded maps are full of zeros
    mask = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    attention_guidance(weights, mask, spurious=None if form in DISTRIBUTION_FORMS else 1 - mask, form=form).backward()
    assert weights.grad.isfinite().all()
    assert weights.grad.ne(0).any()


@pytest.mark.parametrize("form", FORMS)
def test_float16_weights_do_not_overflow(form):
    weights = torch.eye(4, dtype=torch.float16)[None, None].clone().requires_grad_()
    attention_guidance(weights, torch.tensor([[1, 0, 0, 0]]), form=form, reduction="sum").backward()
    assert weights.grad.isfinite().all()


@pytest.mark.parametrize("form", ["mass", "log"])
def test_samples_without_a_choice_have_a_constant_cost(form):
    weights = attention(1, 1, 3, 4).requires_grad_()
    mask, valid = torch.tensor([[1, 1, 1, 0]]), torch.tensor([[1, 1, 1, 0]])
    rewarded = attention_guidance(weights, mask, valid, form=form)
    suppressed = attention_guidance(weights, None, valid, spurious=mask, form=form)
    (rewarded + suppressed).backward()
    assert rewarded.item() == pytest.approx(0.0, abs=1e-6)
    assert suppressed.item() == pytest.approx(1.0, abs=1e-6)
    assert weights.grad.abs().max() < 1e-5


def test_first_row_of_left_padded_samples():
    weights = attention(2, 1, 4, 4)
    valid = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    mask = torch.tensor([[0, 1, 0, 0], [0, 0, 0, 1]])
    losses = attention_guidance(weights, mask, valid, queries="first", reduction="none")
    row = weights[1, 0, 2]
    assert losses[1].item() == pytest.approx(1 - (row[3] / (row[2] + row[3])).item(), rel=1e-5)
    assert losses[0].item() == pytest.approx(1 - weights[0, 0, 0, 1].item(), rel=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("queries", ["all", "first"])
def test_gradcheck(form, queries):
    scores = torch.randn(2, 2, 4, 4, dtype=torch.float64).requires_grad_()
    mask = torch.tensor([[1, 0, 0, 0], [0, 0.5, 1, 0]])
    valid = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])

    def loss(values):
        weights = values.softmax(dim=-1)
        spurious = None if form in DISTRIBUTION_FORMS else mask.flip(1)
        return attention_guidance([weights, weights**2], mask, valid, spurious=spurious, form=form, queries=queries)

    assert torch.autograd.gradcheck(loss, (scores,))


@pytest.mark.parametrize("form", DISTRIBUTION_FORMS)
def test_following_the_gradient_reaches_the_target(form):
    scores = torch.randn(1, 1, 2, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
    mask = torch.tensor([[0.0, 0.0, 1.0, 0.5, 0.5, 0.0]])
    optimizer = torch.optim.Adam([scores], lr=0.3)
    for _ in range(60):
        optimizer.zero_grad()
        attention_guidance(scores.softmax(dim=-1), mask, form=form).backward()
        optimizer.step()
    torch.testing.assert_close(scores.softmax(dim=-1)[0, 0], (mask / 2).expand(2, 6), rtol=0, atol=0.08)


def test_following_the_gradient_moves_attention():
    scores = torch.zeros(1, 1, 2, 6, requires_grad=True)
    relevant, spurious = torch.tensor([[0, 0, 1, 0, 0, 0]]), torch.tensor([[1, 0, 0, 0, 0, 0]])
    optimizer = torch.optim.Adam([scores], lr=0.3)
    for _ in range(40):
        optimizer.zero_grad()
        attention_guidance(scores.softmax(dim=-1), relevant, spurious=spurious, form="log").backward()
        optimizer.step()
    weights = scores.softmax(dim=-1)[0, 0]
    assert weights[:, 2].min() > 0.9
    assert weights[:, 0].max() < 0.02


@pytest.mark.parametrize("form", FORMS)
def test_autocast_and_half_precision_accumulate_in_float32(form):
    weights, mask = torch.full((1, 1, 4, 1000), 1e-3), torch.arange(1000)[None] < 300
    expected = attention_guidance(weights, mask, form=form)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = attention_guidance(weights, mask, form=form)
    torch.testing.assert_close(cast, expected)
    half = attention_guidance(weights.bfloat16(), mask, form=form)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, atol=1e-4, rtol=1e-4 if form in ("mass", "log") else 1e-3)


@pytest.mark.parametrize(("form", "queries"), [("log", "all"), ("log", "first"), ("kl", "all"), ("js", "all")])
def test_compiles_without_a_graph_break(form, queries):
    counter = CompileCounter()
    loss = AttentionGuidedLoss(form, queries)
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for seed in range(3):
        layers = [attention(4, 2, 5, 5, seed=seed), attention(4, 2, 5, 5, seed=seed + 9)]
        torch.testing.assert_close(compiled(layers, MASK, VALID), loss(layers, MASK, VALID))
    assert counter.frame_count == 1


def test_module_is_the_function():
    weights, mask = attention(4, 2, 5, 5), SPURIOUS
    module = AttentionGuidedLoss("log", "first", "sum")
    expected = attention_guidance(weights, MASK, VALID, spurious=mask, form="log", queries="first", reduction="sum")
    torch.testing.assert_close(module(weights, MASK, VALID, spurious=mask), expected)
    assert repr(module) == "AttentionGuidedLoss(form='log', queries='first', reduction='sum')"


def test_weights_without_a_graph_are_accepted():
    assert not attention_guidance(attention(4, 2, 5, 5), MASK).requires_grad


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target_mask": None}, ValueError, r"Nothing to guide by: pass `target_mask` to reward keys"),
        ({"weights": ()}, ValueError, r"`weights` holds no layer: the model returned no attention weights"),
        ({"weights": [None]}, TypeError, r"`weights\[0\]` must be a tensor, got NoneType"),
        (
            {"weights": torch.ones(2, 3, 4)},
            ValueError,
            r"`weights\[0\]` must have 4 axes \(batch, heads",
        ),
        ({"weights": [torch.ones(4, 1, 5, 5), torch.ones(4, 1, 5, 6)]}, ValueError, r"`weights\[1\]` must have shape"),
        ({"target_mask": torch.ones(4, 6)}, ValueError, r"`target_mask` must have shape \(batch, keys\) = \(4, 5\)"),
        ({"target_mask": torch.full((4, 5), 2)}, ValueError, r"`target_mask` must lie between 0 and 1, got 2"),
        ({"spurious": torch.full((4, 5), -0.5)}, ValueError, r"`spurious` must lie between 0 and 1, got -0.5"),
        ({"spurious": torch.ones(4)}, ValueError, r"`spurious` must have shape \(batch, keys\) = \(4, 5\), got \(4,\)"),
        ({"valid": torch.ones(2, 5)}, ValueError, r"`valid` must have shape \(batch, keys\) = \(4, 5\), got \(2, 5\)"),
        ({"form": "ce"}, ValueError, r"`form` must be one of 'mass', 'log', 'kl', 'js', 'iou', got 'ce'"),
        (
            {"form": "js", "spurious": SPURIOUS[:, :5]},
            ValueError,
            r"`spurious` needs form='mass' or form='log', got form='js', which takes `target_mask` alone",
        ),
        ({"queries": "cls"}, ValueError, r"`queries` must be one of 'all', 'first', got 'cls'"),
        ({"reduction": "max"}, ValueError, r"`reduction` must be one of 'none', 'mean', 'sum', got 'max'"),
    ],
)
def test_checks(arguments, error, message):
    arguments = {"weights": attention(4, 2, 5, 5), "target_mask": MASK, **arguments}
    with pytest.raises(error, match=message):
        attention_guidance(**arguments)


def test_module_checks_at_construction():
    for name in ("form", "queries", "reduction"):
        with pytest.raises(ValueError, match=f"`{name}` must be one of"):
            AttentionGuidedLoss(**{name: "no"})
