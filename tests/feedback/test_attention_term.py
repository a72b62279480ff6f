"""The exact-mass term against plain weights: values, gradients, what counts and what does not, memory."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from attn_callbacks.capture import AttentionCall
from attn_callbacks.feedback.attention_term import _index, attention_term, chosen_heads, guided_calls

BATCH, HEADS, KEYS, WIDTH = 3, 4, 6, 8
SPURIOUS = torch.tensor([[0, 0, 1, 0, 0, 1], [0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
RELEVANCE = torch.tensor([[0, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 1, 0]]).bool()
VALID = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]]).bool()
LEFT = VALID.flip(1)
PADDED = VALID[:, None, None]


def layer(name="layer", key_heads=HEADS, dtype=torch.float64, batch=BATCH, keys=KEYS, grad=True, **arguments):
    generator = torch.Generator().manual_seed(len(name))
    query = torch.randn(batch, HEADS, keys, WIDTH, generator=generator, dtype=dtype, requires_grad=grad)
    key = torch.randn(batch, key_heads, keys, WIDTH, generator=generator, dtype=dtype, requires_grad=grad)
    return AttentionCall(name, query=query, key=key, enable_gqa=key_heads != HEADS, **arguments)


def plain_weights(call):
    """Softmax of the scores, written out."""
    key = call.key.repeat_interleave(call.query.shape[1] // call.key.shape[1], dim=1)
    scores = torch.einsum("bhqd,bhkd->bhqk", call.query, key) / math.sqrt(WIDTH)
    if call.mask is not None and call.mask.dtype == torch.bool:
        scores = scores.masked_fill(~call.mask, -math.inf)
    elif call.mask is not None:
        scores = scores + call.mask
    if call.is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf)
    return scores.softmax(dim=-1)


def expected(calls, relevance=None, spurious=None, valid=None, heads=None, queries="all"):
    """The definition, one weight after the other."""
    valid = torch.ones(BATCH, KEYS).bool() if valid is None else valid
    weights = [plain_weights(call) for call in calls]
    terms = []
    for marked, near in ((relevance, True), (spurious, False)):
        samples = []
        for sample in range(BATCH) if marked is not None else ():
            real = [token for token in range(KEYS) if valid[sample, token]]
            members = [token for token in real if marked[sample, token]]
            wanted = members if near else [token for token in real if token not in members]
            if not members or not wanted:
                continue
            rows = real[:1] if queries == "first" else real
            by_layer = []
            for layer_weights, call in zip(weights, calls, strict=True):
                costs = []
                for head, row in product(range(HEADS) if heads is None else heads, rows):
                    reaches = not call.is_causal or min(wanted) <= row
                    if (near or row not in members) and reaches:
                        here = layer_weights[sample, head, row]
                        costs.append(-torch.log(here[wanted].sum() / here[real].sum()))
                if costs:
                    by_layer.append(torch.stack(costs).mean())
            if by_layer:
                samples.append(torch.stack(by_layer).mean())
        if samples:
            terms.append(torch.stack(samples).mean())
    return torch.stack(terms).sum()


ARGUMENTS = {
    "plain": {},
    "padding": {"mask": PADDED},
    "causal": {"is_causal": True},
    "grouped": {"key_heads": 2},
    "bias": {"mask": torch.linspace(-2, 2, KEYS * KEYS, dtype=torch.float64).view(1, 1, KEYS, KEYS)},
    "grouped, causal": {"key_heads": 1, "is_causal": True},
}
SETS = {
    "both": {"relevance": RELEVANCE, "spurious": SPURIOUS},
    "relevance": {"relevance": RELEVANCE},
    "spurious": {"spurious": SPURIOUS},
}


def assert_same(found, wanted, calls):
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-6)
    inputs = [tensor for call in calls for tensor in (call.query, call.key)]
    for own, plain in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(wanted, inputs), strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("queries", ["all", "first"])
@pytest.mark.parametrize("sets", SETS)
@pytest.mark.parametrize("kind", ARGUMENTS)
def test_value_and_gradient_are_those_of_the_plain_weights(kind, sets, queries):
    calls = [layer("a", **ARGUMENTS[kind]), layer("bb", **ARGUMENTS[kind])]
    found = attention_term(calls, **SETS[sets], valid=VALID, queries=queries)
    assert_same(found, expected(calls, **SETS[sets], valid=VALID, queries=queries), calls)


@pytest.mark.parametrize("queries", ["all", "first"])
def test_padding_on_the_left(queries):
    calls = [layer(mask=LEFT[:, None, None])]
    sets = {name: mask.flip(1) for name, mask in SETS["both"].items()}
    found = attention_term(calls, **sets, valid=LEFT, queries=queries)
    assert_same(found, expected(calls, **sets, valid=LEFT, queries=queries), calls)


def test_padding_that_the_model_attends_to_is_left_aside():
    calls = [layer()]
    assert_same(attention_term(calls, RELEVANCE, SPURIOUS, VALID), expected(calls, RELEVANCE, SPURIOUS, VALID), calls)


def test_without_validity_the_mask_of_the_model_tells_padding():
    calls = [layer(mask=PADDED)]
    sets = {"relevance": RELEVANCE & VALID, "spurious": SPURIOUS & VALID}
    torch.testing.assert_close(attention_term(calls, **sets), attention_term(calls, **sets, valid=VALID))


def test_layer_in_which_a_sample_cannot_attend_leaves_its_mean():
    closed = torch.ones(BATCH, 1, KEYS, KEYS, dtype=torch.bool)
    closed[0] = False
    calls, sets = [layer("a"), layer("bb", mask=closed)], {"spurious": SPURIOUS}
    first, second = (
        [expected([call], spurious=SPURIOUS & (torch.arange(BATCH) == n)[:, None]) for call in calls] for n in (0, 1)
    )
    wanted = (first[0] + (second[0] + second[1]) / 2) / 2
    torch.testing.assert_close(attention_term(calls, **sets).double(), wanted, rtol=1e-4, atol=0)


def test_chosen_heads():
    calls = [layer()]
    for queries in ("all", "first"):
        found = attention_term(calls, RELEVANCE, SPURIOUS, VALID, heads=[1, 3], queries=queries)
        assert_same(found, expected(calls, RELEVANCE, SPURIOUS, VALID, heads=[1, 3], queries=queries), calls)


def test_uniform_attention_by_hand():
    tokens = torch.zeros(1, 2, 4, 8, requires_grad=True)
    uniform = [AttentionCall("uniform", query=tokens, key=tokens)]
    mask = torch.tensor([[False, True, False, False]])
    assert float(attention_term(uniform, relevance=mask).detach()) == pytest.approx(math.log(4), abs=1e-5)
    assert float(attention_term(uniform, spurious=mask).detach()) == pytest.approx(math.log(4 / 3), abs=1e-5)
    both = attention_term(uniform, relevance=mask, spurious=mask.roll(1, 1)).detach()
    assert float(both) == pytest.approx(math.log(16 / 3), abs=1e-5)


def test_weights_that_the_model_made_itself():
    reference = layer()
    weights = plain_weights(reference)
    for given in ({"recorded": weights}, {"scores": weights.log()}):
        found = attention_term([AttentionCall("own", **given)], RELEVANCE, SPURIOUS, VALID)
        torch.testing.assert_close(found.double(), expected([reference], RELEVANCE, SPURIOUS, VALID), rtol=1e-4, atol=0)


def test_sampled_rows_of_attention_behind_a_function_of_scores():
    """No kernel answers it, so 64 rows do: the spurious tokens' own are left out, and all others are alike."""
    keys = 100
    odd = torch.arange(keys) % 2 == 1
    query = torch.randn(2, HEADS, 2, WIDTH)[:, :, odd.long()]
    flexible = AttentionCall("flex", query=query, key=query, score_mod=lambda score, *_: score)
    plain = AttentionCall("plain", query=query, key=query)
    spurious = odd.expand(2, -1)
    assert flexible.expectation(torch.ones(keys, 1)).rows is not None
    torch.testing.assert_close(attention_term([flexible], None, spurious), attention_term([plain], None, spurious))


def test_spurious_queries_may_look_at_spurious_tokens():
    """What they gather stays with them, as long as nobody looks at them."""
    weights = torch.zeros(1, 1, 3, 3)
    weights[0, 0, :, 0] = torch.tensor([0.5, 0.5, 0.0])
    weights[0, 0, :, 1] = torch.tensor([0.5, 0.5, 0.0])
    weights[0, 0, 2, 2] = 1.0
    recorded = [AttentionCall("own", recorded=weights)]
    assert float(attention_term(recorded, spurious=torch.tensor([[False, False, True]]))) == pytest.approx(0, abs=1e-5)
    assert float(attention_term(recorded, spurious=torch.tensor([[True, False, False]]))) > 0.3


def test_nothing_wanted_is_zero_with_a_gradient():
    calls, none = [layer(dtype=torch.float32)], torch.zeros(BATCH, KEYS).bool()
    for sets in ({"relevance": none}, {"spurious": none}, {"spurious": ~none}):
        term = attention_term(calls, **sets, valid=VALID)
        assert float(term.detach()) == 0
        (gradient,) = torch.autograd.grad(term, calls[0].query)
        assert bool((gradient == 0).all())


def test_rows_and_samples_without_any_allowed_key_stay_finite():
    mask = torch.ones(BATCH, 1, KEYS, KEYS, dtype=torch.bool)
    mask[0] = False
    mask[1, :, 2] = False
    valid = VALID.clone()
    valid[2] = False
    for queries in ("all", "first"):
        own = layer(dtype=torch.float32, mask=mask)
        term = attention_term([own], RELEVANCE, SPURIOUS, valid, queries=queries)
        term.backward()
        assert bool(term.isfinite())
        assert bool(own.query.grad.isfinite().all())
        assert bool(own.key.grad.isfinite().all())


def test_mass_of_almost_nothing_still_pulls():
    query = torch.zeros(1, 1, 2, 1, requires_grad=True)
    key = torch.tensor([[[[0.0], [-12.0]]]])  # the second key has a weight of about e-12
    with torch.no_grad():
        query += 1
    call = AttentionCall("far", query=query, key=key, scale=1.0)
    term = attention_term([call], relevance=torch.tensor([[False, True]]))
    term.backward()
    assert 10 < float(term.detach()) < 13
    assert bool((query.grad > 1).all())


@pytest.mark.parametrize("is_causal", [False, True])
def test_no_matrix_of_queries_and_keys_is_kept(is_causal, monkeypatch):
    keys = 1024
    call = layer(batch=1, keys=keys, dtype=torch.float32, is_causal=is_causal)
    sizes = []
    monkeypatch.setattr(AttentionCall, "weights", lambda *_: pytest.fail("weights were asked for"))
    marked = torch.arange(keys)[None] % 7 == 3
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: sizes.append(tensor.numel()) or tensor, lambda x: x):
        term = attention_term([call], marked.roll(1, 1), marked, torch.ones(1, keys).bool())
    term.backward()
    assert call.query.grad.abs().sum() > 0
    assert max(sizes) <= HEADS * keys * (WIDTH + 1) < keys * keys


def test_first_query_costs_one_row(monkeypatch):
    call, asked, weights = layer(), [], AttentionCall.weights
    monkeypatch.setattr(AttentionCall, "weights", lambda self, rows=None: asked.append(rows) or weights(self, rows))
    attention_term([call], RELEVANCE, valid=LEFT, queries="first")
    assert [rows.tolist() for rows in asked] == [[[0], [2], [1]]]


def test_guided_calls_are_self_attention_over_the_annotated_tokens_with_a_graph():
    own, frozen = layer("own"), layer("frozen", grad=False)
    others = [layer("cross", is_cross=True), layer("pooled", keys=2), layer("windows", batch=8)]
    assert guided_calls([*others, frozen, own], (BATCH, KEYS)) == [own]
    with torch.no_grad():
        assert guided_calls([*others, frozen, own], (BATCH, KEYS)) == [frozen, own]


@pytest.mark.parametrize(("keys", "seen"), [(5, r"\[\(3, 5\)\]"), (None, "none")])
def test_annotation_of_other_tokens_is_refused(keys, seen):
    calls = [] if keys is None else [layer(keys=keys)]
    with pytest.raises(RuntimeError, match=rf"over \(batch, keys\) = \(3, 6\); seen: {seen}. Annotate every token"):
        guided_calls(calls, (BATCH, KEYS))


def test_nothing_trainable_is_refused():
    with pytest.raises(RuntimeError, match=r"'frozen': none of the 1 calls carries a gradient.*use_reentrant"):
        guided_calls([layer("frozen", grad=False)], (BATCH, KEYS))


@pytest.mark.parametrize(
    ("calls", "arguments", "message"),
    [
        ([], {"relevance": RELEVANCE}, "`calls` must hold at least one"),
        ([layer()], {}, "Nothing to guide by: pass `relevance`"),
        ([layer()], {"relevance": RELEVANCE[:, :3]}, r"`relevance` must have shape .* = \(3, 6\), got \(3, 3\)"),
        ([layer()], {"relevance": RELEVANCE, "valid": VALID[:1]}, r"`valid` must have shape .*got \(1, 6\)"),
        ([layer(), layer("pooled", keys=2)], {"spurious": SPURIOUS}, r"`pooled as \(batch, keys\)` must have"),
        ([layer()], {"spurious": SPURIOUS, "heads": [4]}, r"`heads` must lie in 0..3, the heads of 'layer', got \[4\]"),
        ([layer()], {"spurious": SPURIOUS, "heads": [-1]}, "`heads` must lie in"),
        ([layer()], {"spurious": SPURIOUS, "queries": "last"}, "`queries` must be one of 'all', 'first'"),
    ],
)
def test_wrong_arguments_are_refused(calls, arguments, message):
    with pytest.raises(ValueError, match=message):
        attention_term(calls, **arguments)


def test_head_index_is_copied_once_and_can_be_trained_through():
    _index.cache_clear()
    first = layer()
    with torch.inference_mode():
        chosen_heads(first, torch.zeros(2, HEADS, 4), (1,))
    values = torch.ones(2, HEADS, 4, requires_grad=True)
    chosen_heads(first, values, [1]).sum().backward()
    assert values.grad.sum(dim=(0, 2)).tolist() == [0.0, 8.0, 0.0, 0.0]
    assert _index((1,), values.device) is _index((1,), values.device)
    assert chosen_heads(first, values, None) is values
