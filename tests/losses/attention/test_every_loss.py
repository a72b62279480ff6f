"""What every attention loss promises: NaN shows, padding may be NaN, float16 is exact, and inputs are told apart."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from losses.attention.alignment import GuidedAlignmentLoss, guided_alignment
from losses.attention.consistency import AttentionConsistencyLoss, attention_consistency
from losses.attention.disagreement import HeadDisagreementLoss, head_disagreement
from losses.attention.entropy import AttentionEntropyLoss, attention_entropy
from losses.attention.guidance import AttentionGuidedLoss, attention_guidance
from losses.attention.sparsity import AttentionSparsityLoss, attention_sparsity
from losses.attention.suppression import AttentionSuppressionLoss, attention_suppression


def attention(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).softmax(dim=-1)


def layers_of(weights):
    return [weights] if isinstance(weights, torch.Tensor) else list(weights)


def members(weights):
    """A set of few keys, one of them not the first row's own."""
    first = layers_of(weights)[0]
    mask = torch.zeros(first.shape[0], first.shape[3])
    mask[:, 1] = 1
    return mask


def links(weights):
    first = layers_of(weights)[0]
    return torch.eye(max(first.shape[2:]))[: first.shape[2], : first.shape[3]].expand(len(first), -1, -1)


def other(weights):
    views = [attention(*layer.shape, seed=7).to(layer.dtype) for layer in layers_of(weights)]
    return views[0] if isinstance(weights, torch.Tensor) else views


def guidance(**arguments):
    return lambda weights, valid=None, **more: attention_guidance(weights, members(weights), valid, **arguments, **more)


def spurious(weights, valid=None, **more):
    return attention_guidance(weights, None, valid, spurious=members(weights), form="log", **more)


def suppression(weights, valid=None, **more):
    return attention_suppression(weights, members(weights), valid, **more)


def entropy(mode):
    return lambda weights, valid=None, **more: attention_entropy(weights, valid, mode=mode, **more)


def gated(weights):
    return weights * 0.5 if isinstance(weights, torch.Tensor) else [layer * 0.5 for layer in weights]


def l1(weights, valid=None, **more):
    return attention_sparsity(gated(weights), valid, form="l1", **more)


def alignment(weights, valid=None, **more):
    return guided_alignment(weights, links(weights), valid, **more)


def consistency(weights, valid=None, **more):
    return attention_consistency(weights, other(weights), valid, **more)


LOSSES = {
    **{form: guidance(form=form) for form in ("mass", "log", "kl", "js", "iou")},
    "first row": guidance(form="log", queries="first"),
    "spurious": spurious,
    "suppression": suppression,
    **{mode: entropy(mode) for mode in ("raise", "lower", "ear")},
    "hoyer": attention_sparsity,
    "l1": l1,
    "disagreement": head_disagreement,
    "other heads": lambda weights, valid=None, **more: head_disagreement(weights, valid, self_pairs=False, **more),
    "consistency": consistency,
    "alignment": alignment,
}
VECTORS = {
    "values": lambda weights, valid=None: head_disagreement(weights, valid, of="values"),
    "outputs": lambda weights, valid=None: head_disagreement(weights, valid, of="outputs", self_pairs=False),
}
every = pytest.mark.parametrize("name", LOSSES)
every_with_vectors = pytest.mark.parametrize("name", [*LOSSES, *VECTORS])
UNSIGNED = [name for name in LOSSES if name != "l1"]


def loss_called(name):
    return (LOSSES | VECTORS)[name]


# NaN


@pytest.mark.parametrize("where", ["everywhere", "in one row"])
@every_with_vectors
def test_nan_in_a_real_row_reaches_the_loss(name, where):
    weights = attention(2, 3, 4, 4)
    weights[(slice(None),) * 4 if where == "everywhere" else (0, 1, 0)] = torch.nan  # row 0 is real in every form
    assert loss_called(name)(weights).isnan()


@every_with_vectors
def test_rows_of_padding_may_be_nan(name):
    loss, weights = loss_called(name), attention(2, 3, 5, 5)
    valid = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
    poisoned = weights.clone()
    for sample, first in enumerate((4, 3)):
        poisoned[sample, :, first:] = torch.nan
    told = {"query_valid": valid} if name == "alignment" else {}
    leaf = poisoned.requires_grad_()
    given = loss(leaf, valid, **told)
    torch.testing.assert_close(given, loss(weights, valid, **told))
    given.backward()
    plain = weights.clone().requires_grad_()
    loss(plain, valid, **told).backward()
    # What holds of the gradient: that of real rows is the same. That of the NaN rows may be NaN, since NaN times zero
    # is; the masked softmax that made them stops it there, or has made NaN of everything by itself.
    for sample, first in enumerate((4, 3)):
        torch.testing.assert_close(leaf.grad[sample, :, :first], plain.grad[sample, :, :first])
    assert plain.grad.isfinite().all()


@every
def test_rows_that_query_valid_leaves_out_may_be_nan(name):
    weights = attention(2, 3, 4, 5)
    real = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    poisoned = weights.masked_fill((real == 0)[:, None, :, None], torch.nan)
    torch.testing.assert_close(
        LOSSES[name](poisoned, query_valid=real), LOSSES[name](weights, query_valid=real), rtol=1e-6, atol=1e-7
    )


def test_a_masked_softmax_with_rows_of_nothing_trains():
    scores = torch.randn(1, 2, 4, 4).requires_grad_()
    valid = torch.tensor([[1, 1, 1, 0]])
    pairs = (valid[:, None, :, None] * valid[:, None, None, :]) != 0
    for name in ("mass", "log", "js", "suppression", "raise", "hoyer", "disagreement"):
        scores.grad = None
        LOSSES[name](scores.masked_fill(~pairs, -torch.inf).softmax(dim=-1), valid).backward()
        assert scores.grad.isfinite().all(), name
        assert scores.grad.ne(0).any(), name


# Self-attention and cross-attention


@pytest.mark.parametrize("valid", [None, torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])], ids=["full", "padded"])
@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("first row", "alignment", "ear")])
def test_square_cross_attention_equals_its_rows_in_two_batches(name, valid):
    weights = attention(2, 3, 4, 4)
    loss, real = LOSSES[name], torch.ones(2, 4)
    halves = [loss(weights[:, :, part], valid, reduction="none") for part in (slice(0, 2), slice(2, 4))]
    if name == "consistency":
        views = weights, attention(2, 3, 4, 4, seed=7)
        halves = [
            attention_consistency(*(view[:, :, part] for view in views), valid, reduction="none")
            for part in (slice(0, 2), slice(2, 4))
        ]
    given = loss(weights, valid, query_valid=real, reduction="none")
    torch.testing.assert_close(given, (halves[0] + halves[1]) / 2)
    if valid is not None or name == "suppression":
        assert not torch.allclose(given, loss(weights, valid, reduction="none"))  # taken for self-attention


@every
def test_rows_that_are_not_real_do_not_count(name):
    weights = attention(2, 3, 5, 4)
    real = torch.tensor([[1, 1, 0, 1, 0], [1, 1, 0, 1, 0]])
    kept = [0, 1, 3]
    changed = weights.clone()
    changed[:, :, [2, 4]] = attention(2, 3, 2, 4, seed=5)
    given = LOSSES[name](changed, query_valid=real)
    torch.testing.assert_close(given, LOSSES[name](weights, query_valid=real))
    if name not in ("alignment", "consistency"):  # which go with another mask, or another view
        torch.testing.assert_close(given, LOSSES[name](weights[:, :, kept]))


def test_the_first_real_query_is_told_by_query_valid():
    weights = attention(2, 3, 4, 4)
    real = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
    valid = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    given = attention_guidance(weights, members(weights), valid, queries="first", query_valid=real, reduction="none")
    for sample, row in enumerate((2, 1)):
        one = slice(sample, sample + 1)
        alone = attention_guidance(weights[one, :, row : row + 1], members(weights)[one], valid[one])
        torch.testing.assert_close(given[sample], alone)


@every
def test_without_a_real_query_it_is_a_finite_zero_with_a_gradient(name):
    weights = attention(2, 3, 4, 4).requires_grad_()
    loss = LOSSES[name](weights, query_valid=torch.zeros(2, 4))
    loss.backward()
    assert loss.item() == 0.0
    assert weights.grad.eq(0).all()


def test_every_real_query_counts_in_square_cross_attention():
    weights, mask = attention(1, 2, 4, 4), torch.tensor([[1, 0, 0, 0]])
    given = attention_suppression(weights, mask, query_valid=torch.ones(1, 4))
    torch.testing.assert_close(given, -torch.log(1 - weights[..., 0]).mean())


def test_pair_masks_go_with_query_valid():
    weights, real = attention(2, 3, 4, 4), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    causal = torch.ones(1, 1, 4, 4).tril()
    rows = causal * real[:, None, :, None]
    for loss in (attention_entropy, attention_sparsity):
        torch.testing.assert_close(loss(weights, causal, query_valid=real), loss(weights, rows))


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "alignment"])
def test_query_valid_must_fit_every_layer(name):
    layers = [attention(2, 3, 4, 5), attention(2, 3, 6, 5)]
    with pytest.raises(
        ValueError, match=r"`query_valid` must have shape \(batch, queries\) of `weights\[1\]` = \(2, 6\), got \(2, 4\)"
    ):
        LOSSES[name](layers, query_valid=torch.ones(2, 4))


def test_query_valid_is_for_attention():
    with pytest.raises(ValueError, match="`query_valid` needs of='attention', got of='values'"):
        head_disagreement(attention(2, 3, 4, 4), of="values", query_valid=torch.ones(2, 4))


MODULES = {
    "guidance": (AttentionGuidedLoss("log"), lambda w: (w, members(w)), LOSSES["log"]),
    "suppression": (AttentionSuppressionLoss(), lambda w: (w, members(w)), suppression),
    "entropy": (AttentionEntropyLoss(), lambda w: (w,), attention_entropy),
    "sparsity": (AttentionSparsityLoss(), lambda w: (w,), attention_sparsity),
    "disagreement": (HeadDisagreementLoss(), lambda w: (w,), head_disagreement),
    "consistency": (AttentionConsistencyLoss(), lambda w: (w, other(w)), consistency),
    "alignment": (GuidedAlignmentLoss(), lambda w: (w, links(w)), alignment),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_pass_query_valid_on_and_take_names(name):
    module, arguments, function = MODULES[name]
    weights, real = attention(2, 3, 4, 4), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    valid = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 1]])
    expected = function(weights, valid, query_valid=real)
    torch.testing.assert_close(module(*arguments(weights), valid, query_valid=real), expected)
    _, *rest = arguments(weights)
    names = {"guidance": ["target_mask"], "suppression": ["target_mask"], "alignment": ["target_mask"]}
    named = dict(zip(names.get(name, ["other"]), rest, strict=False))
    torch.testing.assert_close(module(weights=weights, valid=valid, query_valid=real, **named), expected)


# Half precision


@pytest.mark.parametrize("keys", [64, 1024, 4096])
@every
def test_float16_is_float32_of_the_same_rounded_weights(name, keys):
    sharp = torch.randn(1, 2, 3, keys, generator=torch.Generator().manual_seed(keys)) * 3
    half = sharp.softmax(dim=-1).half()
    half[0, 0, 0] = torch.eye(keys, dtype=torch.float16)[3]  # misses the set, with exact zeros
    leaf = half.requires_grad_()
    given, expected = LOSSES[name](leaf), LOSSES[name](half.detach().float())
    assert given.dtype == torch.float32
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-6)
    (given * 2**16).backward()  # as a gradient scaler starts
    assert leaf.grad.isfinite().all()


def test_float16_tells_missing_everything_from_missing_half():
    rows = torch.zeros(1, 1, 2, 1024, dtype=torch.float16)
    rows[..., 5] = 1
    assert attention_guidance(rows, members(rows), form="js").item() == pytest.approx(1.0, abs=2e-3)
    assert attention_guidance(rows, members(rows), form="log").item() == pytest.approx(2.0, abs=1e-3)


@pytest.mark.parametrize("name", ["log", "suppression", "alignment", "raise"])
def test_float16_compiles_without_a_graph_break(name):
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(LOSSES[name], backend=counter, fullgraph=True)
    for seed in range(2):
        weights = attention(2, 3, 4, 4, seed=seed).half().requires_grad_()
        torch.testing.assert_close(compiled(weights), LOSSES[name](weights))
    assert counter.frame_count == 1


# What cannot be meant


ADDITIVE = torch.tensor([[0.0, 0.0, 0.0, -1e9], [0.0, 0.0, 0.0, 0.0]])


@every_with_vectors
def test_masks_to_add_are_refused(name):
    with pytest.raises(ValueError, match=r"`valid` must lie between 0 and 1, got -1000000000.0.*pass `mask >= 0`"):
        loss_called(name)(attention(2, 3, 4, 4), ADDITIVE)
    loss_called(name)(attention(2, 3, 4, 4), ADDITIVE >= 0)


@every
def test_query_masks_to_add_are_refused(name):
    with pytest.raises(ValueError, match=r"`query_valid` must lie between 0 and 1, got -1000000000.0"):
        LOSSES[name](attention(2, 3, 4, 4), query_valid=ADDITIVE)


@pytest.mark.parametrize("name", ["raise", "lower", "hoyer", "l1"])
def test_pair_masks_to_add_are_refused(name):
    mask = torch.full((1, 1, 4, 4), -torch.inf).triu(1)
    with pytest.raises(ValueError, match=r"`valid` must lie between 0 and 1, got -inf.*pass `mask >= 0`"):
        LOSSES[name](attention(2, 3, 4, 4), mask)


@pytest.mark.parametrize("name", UNSIGNED)
@pytest.mark.parametrize("scores", [torch.randn(2, 3, 4, 4), -torch.rand(2, 3, 4, 4)], ids=["both signs", "negative"])
def test_scores_before_the_softmax_are_refused(name, scores):
    with pytest.raises(ValueError, match="`weights` must be attention after the softmax"):
        LOSSES[name](scores)


@pytest.mark.parametrize("name", ["mass", "log", "suppression", "spurious"])
def test_shares_outside_zero_and_one_are_refused(name):
    scores = torch.tensor([3.0, -1.0, 1.0, 1.0]).expand(1, 1, 2, 4)  # every row has a positive sum
    with pytest.raises(ValueError, match="`weights` must be attention after the softmax"):
        LOSSES[name](scores)


@every
def test_what_is_not_real_is_not_judged(name):
    weights, real = attention(2, 3, 4, 5), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    weights = torch.where((real == 0)[:, None, :, None], -3.0, weights)
    assert LOSSES[name](weights, query_valid=real).isfinite()


CALLS = {
    "guidance": lambda weights: attention_guidance(weights, torch.zeros(2, 4)),
    "distribution": lambda weights: attention_guidance(weights, torch.zeros(2, 4), form="js"),
    "suppression": lambda weights: attention_suppression(weights, torch.zeros(2, 4)),
    "entropy": attention_entropy,
    "sparsity": attention_sparsity,
    "disagreement": head_disagreement,
    "values": lambda weights: head_disagreement(weights, of="values"),
    "consistency": lambda weights: attention_consistency(weights, weights),
    "alignment": lambda weights: guided_alignment(weights, torch.zeros(2, 4, 4)),
}


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (torch.zeros(2, 0, 4, 4), ValueError, r"`weights\[0\]` must have at least one head, query and key, got shape"),
        (torch.zeros(2, 3, 0, 4), ValueError, r"`weights\[0\]` must have at least one head, query and key, got shape"),
        (torch.zeros(2, 3, 4, 4).long(), TypeError, r"`weights\[0\]` must be a floating tensor, got torch.int64"),
        ([None], TypeError, r"`weights\[0\]` must be a tensor, got NoneType"),
        (None, TypeError, "`weights` must be a tensor or a list of tensors, one a layer, got NoneType. Capture"),
    ],
    ids=["heads", "queries", "integers", "no layer", "nothing"],
)
@pytest.mark.parametrize("name", CALLS)
def test_what_is_no_attention_is_refused_in_words(name, weights, error, message):
    with pytest.raises(error, match=message):
        CALLS[name](weights)


def test_values_are_not_looked_at_in_function_transforms():
    weights = attention(3, 2, 2, 4, 4).reshape(3, 2, 2, 4, 4)
    mask = torch.tensor([[0.0, 1.0, 0.0, 0.0]] * 2)
    given = torch.func.vmap(lambda one: attention_suppression(one, mask, torch.ones(2, 4)))(weights)
    expected = torch.stack([attention_suppression(one, mask, torch.ones(2, 4)) for one in weights])
    torch.testing.assert_close(given, expected)
