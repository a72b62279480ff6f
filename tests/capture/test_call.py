from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attn_callbacks.capture import AttentionCall
from tests.capture.reference import attention_rows, close


def tensors(
    batch: int = 2, heads: int = 4, queries: int = 5, keys: int = 5, key_heads: int = 4
) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, heads, queries, 8), torch.randn(batch, key_heads, keys, 8)


def kernel_weights(query: Tensor, key: Tensor, **options: object) -> Tensor:
    """The fused kernel's own weights: its output for the identity in the place of the values."""
    value = torch.eye(key.shape[2], key.shape[3]).expand(
        *key.shape
    )  # of the keys' width: else no fused kernel takes it
    return F.scaled_dot_product_attention(query, key, value, **options)[..., : key.shape[2]]


KEEP = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()[:, None, None]
ALIBI = -(torch.arange(5)[:, None] - torch.arange(5)).abs() * torch.tensor([0.5, 0.25, 0.125, 0.0625])[:, None, None]
MASKS = {
    "none": None,
    "boolean padding": KEEP,
    "boolean pairs": torch.rand(2, 1, 5, 5) > 0.4,
    "boolean, all heads": torch.rand(2, 4, 5, 5) > 0.4,
    "boolean, two axes": (torch.rand(1, 1, 5, 5) > 0.4),
    "float bias": torch.randn(1, 4, 5, 5),
    "float alibi": ALIBI[None],
    "float padding": torch.zeros(2, 1, 1, 5).masked_fill(~KEEP, -math.inf),
    "float minimum": torch.zeros(2, 1, 1, 5).masked_fill(~KEEP, torch.finfo(torch.float32).min),
    "float big": torch.zeros(2, 1, 1, 5).masked_fill(~KEEP, -1e9),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_weights_equal_rows_computed_one_by_one(mask: Tensor | None, is_causal: bool, scale: float | None) -> None:
    query, key = tensors()
    call = AttentionCall("a", query=query, key=key, mask=mask, is_causal=is_causal, scale=scale)
    assert close(call.weights(), attention_rows(query, key, mask, is_causal, scale))


@pytest.mark.parametrize("mask", [MASKS["none"], MASKS["boolean padding"], MASKS["float bias"], MASKS["float alibi"]])
@pytest.mark.parametrize("is_causal", [False, True])
def test_weights_equal_those_of_the_kernel(mask: Tensor | None, is_causal: bool) -> None:
    query, key = tensors()
    expected = kernel_weights(query, key, attn_mask=mask, is_causal=is_causal)
    assert close(AttentionCall("a", query=query, key=key, mask=mask, is_causal=is_causal).weights(), expected)


@pytest.mark.parametrize(("queries", "keys"), [(3, 7), (7, 3), (1, 6)])
def test_causal_attention_starts_at_the_first_query_and_key(queries: int, keys: int) -> None:
    query, key = tensors(queries=queries, keys=keys)
    call = AttentionCall("a", query=query, key=key, is_causal=True)
    assert close(call.weights(), attention_rows(query, key, is_causal=True))
    assert close(call.weights(), kernel_weights(query, key, is_causal=True))
    assert call.key_valid.tolist() == [[j < queries for j in range(keys)]] * 2
    assert call.query_valid.all()


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_query_heads_share_key_heads_in_groups(key_heads: int) -> None:
    query, key = tensors(key_heads=key_heads)
    call = AttentionCall("a", query=query, key=key, enable_gqa=True)
    assert close(call.weights(), attention_rows(query, key))
    assert close(call.weights(), kernel_weights(query, key, enable_gqa=True))


def test_broadcast_batch_and_heads() -> None:
    query, key = torch.randn(1, 1, 3, 8), torch.randn(2, 4, 5, 8)
    call = AttentionCall("a", query=query, key=key, is_cross=True)
    assert call.shape == (2, 4, 3, 5)
    assert close(call.weights(), attention_rows(query.expand(2, 4, -1, -1), key))
    assert close(
        call.weights(torch.tensor([[0], [2]])),
        attention_rows(query.expand(2, 4, -1, -1), key)[[0, 1], :, [0, 2]][:, :, None],
    )


ROWS = {
    "shared": torch.tensor([4, 0]),
    "by sample": torch.tensor([[4, 0, 1], [2, 2, 3]]),
    "none": torch.tensor([]).long(),
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("source", ["fused", "causal", "scores", "recorded"])
def test_rows_are_rows_of_the_whole(rows: Tensor, mask: Tensor | None, source: str) -> None:
    query, key = tensors()
    call = AttentionCall("a", query=query, key=key, mask=mask, is_causal=source == "causal")
    if source in ("scores", "recorded"):
        whole = call.logits() if source == "scores" else call.weights()
        call = AttentionCall("a", **{source: whole})
    picks = rows.expand(2, -1) if rows.ndim == 1 else rows

    def pick(whole: Tensor) -> Tensor:
        return torch.stack([maps[:, wanted] for maps, wanted in zip(whole.expand(2, 4, 5, 5), picks, strict=True)])

    assert call.weights(rows).shape == (2, 4, rows.shape[-1], 5)
    assert torch.allclose(call.weights(rows), pick(call.weights()), atol=1e-6)
    assert torch.equal(call.allowed(rows).expand(2, 4, rows.shape[-1], 5), pick(call.allowed()))
    logits = call.logits(rows)
    assert (logits is None) == (source == "recorded")
    if logits is not None:
        assert torch.allclose(logits, pick(call.logits()), atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 3, 4), (3, 4), ()])
def test_rows_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    query, key = tensors()
    for call in (AttentionCall("a", query=query, key=key), AttentionCall("a", recorded=torch.ones(2, 1, 5, 5))):
        with pytest.raises(ValueError, match=r"`rows` must have shape \(rows,\) or \(batch, rows\) = \(2, rows\)"):
            call.weights(torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("rows", [[0, 4], (0, 4), [], list(np.array([4, 1])), [3, 3]])
def test_rows_may_be_a_list(rows: list[int]) -> None:
    for call in every_source().values():
        picks = torch.tensor(rows, dtype=torch.long)
        assert torch.equal(call.weights(rows), call.weights(picks))
        assert torch.equal(call.allowed(rows), call.allowed(picks))
        assert call.recorded is not None or torch.equal(call.logits(rows), call.logits(picks))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
@pytest.mark.parametrize("rows", [[4, 0], [[4, 0], [1, 2]]])
def test_rows_of_any_integer_type_are_indices(dtype: torch.dtype, rows: list[int]) -> None:
    picks = torch.tensor(rows)
    for call in every_source().values():
        assert torch.equal(call.weights(picks.to(dtype)), call.weights(picks))
        assert torch.equal(call.allowed(picks.to(dtype)), call.allowed(picks))


@pytest.mark.parametrize("source", ["fused", "scores", "recorded", "flex"])
@pytest.mark.parametrize(
    ("error", "rows", "message"),
    [
        (TypeError, torch.tensor([0.0, 1.0]), "`rows` must hold integers, the indices of queries, got torch.float32"),
        (TypeError, torch.tensor([True] * 5), "`rows` must hold integers, the indices of queries, got torch.bool"),
        (TypeError, [0.5, 1.0], r"`rows` must be a tensor or a list of integers, got \[0.5, 1.0\]"),
        (TypeError, [True, False], r"`rows` must be a tensor or a list of integers, got \[True, False\]"),
        (TypeError, [[0], [1]], r"`rows` must be a tensor or a list of integers, got \[\[0\], \[1\]\]"),
        (TypeError, 3, "`rows` must be a tensor or a list of integers, got 3"),
        (ValueError, [0, 5], "`rows` must lie between 0 and 4, got 5"),
        (ValueError, [-1, 0], "`rows` must lie between 0 and 4, got -1"),
        (ValueError, torch.tensor([0, 9]), "`rows` must lie between 0 and 4, got 9"),
        (ValueError, torch.tensor([[0, 1], [2, -2]]), "`rows` must lie between 0 and 4, got -2"),
    ],
)
def test_rows_that_are_no_queries_are_refused(source: str, error: type[Exception], rows: Tensor, message: str) -> None:
    call = every_source()[source]
    for asked in (call.weights, call.allowed, *([call.logits] if call.recorded is None else [])):
        with pytest.raises(error, match=message):
            asked(rows)


def test_rows_on_an_accelerator_are_not_looked_at() -> None:
    tokens = torch.zeros(2, 4, 5, 8, device="meta")  # the meta device has no value to look at
    rows = torch.zeros(3, dtype=torch.long, device="meta")
    assert AttentionCall("a", query=tokens, key=tokens, is_causal=True).allowed(rows).shape == (1, 1, 3, 5)
    call = AttentionCall("a", recorded=torch.ones(2, 4, 5, 5, device="meta"))
    assert call.weights(rows).shape == (2, 4, 3, 5)
    with pytest.raises(ValueError, match="`rows` must lie between 0 and 4, got 5"):
        call.weights([5])


def test_logits_are_minus_infinity_where_a_query_may_not_attend() -> None:
    query, key = tensors()
    call = AttentionCall("a", query=query, key=key, mask=MASKS["float minimum"], is_causal=True)
    logits, allowed = call.logits(), call.allowed().expand(2, 4, 5, 5)
    assert torch.equal(logits == -math.inf, ~allowed)
    assert allowed[1, 0].tolist() == [[j <= i and j < 3 for j in range(5)] for i in range(5)]
    expected = (query.double() @ key.double().mT / 8**0.5)[allowed]
    assert torch.allclose(logits[allowed].double(), expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("empty", [False, -math.inf, torch.finfo(torch.float32).min])
def test_rows_without_keys_are_zero_in_value_and_gradient(empty: float) -> None:
    query, key = (tensor.requires_grad_() for tensor in tensors())
    mask = torch.ones(2, 1, 5, 5).bool() if empty is False else torch.zeros(2, 1, 5, 5)
    mask[1, :, 2] = empty
    weights = AttentionCall("a", query=query, key=key, mask=mask).weights()
    assert weights[1, :, 2].eq(0).all()
    assert torch.allclose(weights.sum(dim=-1)[0], torch.ones(4, 5))
    with torch.autograd.detect_anomaly(check_nan=True):  # no NaN on the way either
        weights = AttentionCall("a", query=query, key=key, mask=mask).weights()
        (weights * torch.randn_like(weights)).sum().backward()
    assert query.grad.isfinite().all()
    assert key.grad.isfinite().all()
    assert query.grad[1, :, 2].eq(0).all()


def test_gradients_equal_those_of_explicit_attention() -> None:
    query, key = (tensor.requires_grad_() for tensor in tensors(key_heads=2))
    bias, wanted = torch.randn(1, 4, 5, 5, requires_grad=True), torch.randn(2, 4, 5, 5)
    call = AttentionCall("a", query=query, key=key, mask=bias)
    assert call.requires_grad
    got = torch.autograd.grad((call.weights() * wanted).sum(), (query, key, bias))
    scores = query @ key.repeat_interleave(2, dim=1).mT / 8**0.5 + bias
    expected = torch.autograd.grad((scores.softmax(dim=-1) * wanted).sum(), (query, key, bias))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, expected, strict=True))


def test_detach_cuts_the_graph_of_every_tensor() -> None:
    query, key = (tensor.requires_grad_() for tensor in tensors())
    call = AttentionCall("a", query=query, key=key, mask=torch.zeros(1, 1, 5, 5, requires_grad=True), is_causal=True)
    assert not call.detach().requires_grad
    assert torch.equal(call.detach().weights(), call.weights())
    assert query.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("source", ["fused", "scores", "recorded"])
def test_half_precision_is_computed_in_float32_also_under_autocast(dtype: torch.dtype, source: str) -> None:
    query, key = (tensor.to(dtype) for tensor in tensors())
    expected = attention_rows(query, key)
    given = {"fused": {"query": query, "key": key}}.get(source, {source: torch.tensor(expected).to(dtype)})
    call = AttentionCall("a", **given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights = call.weights()
    assert weights.dtype == torch.float32
    if source == "fused":
        assert close(weights, expected, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_minimum_of_half_precision_is_a_mask(dtype: torch.dtype) -> None:
    query, key = (tensor.to(dtype) for tensor in tensors())
    mask = torch.zeros(2, 1, 1, 5, dtype=dtype).masked_fill(~KEEP, torch.finfo(dtype).min)
    call = AttentionCall("a", query=query, key=key, mask=mask)
    assert call.key_valid.tolist() == KEEP[:, 0, 0].tolist()
    assert close(call.weights(), attention_rows(query, key, KEEP))


def test_double_precision_stays() -> None:
    query, key = (tensor.double() for tensor in tensors())
    weights = AttentionCall("a", query=query, key=key).weights()
    assert weights.dtype == torch.float64
    assert close(weights, attention_rows(query, key), 1e-15)


def test_score_and_mask_functions_are_evaluated_at_every_position() -> None:
    query, key = tensors()
    slopes, lengths = torch.tensor([0.5, 0.25, 0.1, 0.0]), torch.tensor([5, 3])
    call = AttentionCall(
        "a",
        query=query,
        key=key,
        score_mod=lambda score, b, h, q, k: score - slopes[h] * (q - k).abs(),
        mask_mod=lambda b, h, q, k: (k <= q + h) & (k < lengths[b]),
    )
    b, h, q, k = (
        torch.arange(n).view(*shape)
        for n, shape in zip((2, 4, 5, 5), ((2, 1, 1, 1), (4, 1, 1), (5, 1), (5,)), strict=True)
    )
    mask = torch.where((k <= q + h) & (k < lengths[b]), -slopes[h] * (q - k).abs(), -math.inf)
    assert close(call.weights(), attention_rows(query, key, mask))
    assert call.key_valid.tolist() == KEEP[:, 0, 0].tolist()


def test_valid_keys_of_a_mask_function_come_in_chunks_of_rows() -> None:
    asked = []

    def window(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        asked.append(1)
        return (q - k).abs() == 290

    tokens = torch.zeros(1, 1, 600, 2)
    call = AttentionCall("a", query=tokens, key=tokens, mask_mod=window)
    assert call.key_valid.all()
    assert len(asked) == 3


@pytest.mark.parametrize(
    "mask", [KEEP, torch.zeros(2, 1, 1, 5).masked_fill(~KEEP, -math.inf), KEEP & torch.ones(5, 5).tril().bool()]
)
def test_padding_is_read_from_the_mask(mask: Tensor) -> None:
    query, key = tensors()
    self_attention = AttentionCall("a", query=query, key=key, mask=mask)
    assert self_attention.key_valid.tolist() == KEEP[:, 0, 0].tolist()
    assert self_attention.query_valid.tolist() == KEEP[:, 0, 0].tolist()
    cross = AttentionCall("a", query=query, key=key, mask=mask, is_cross=True)
    assert cross.key_valid.tolist() == KEEP[:, 0, 0].tolist()
    assert cross.query_valid.all()


@pytest.mark.parametrize("source", ["scores", "recorded"])
def test_padding_is_read_from_scores_and_weights(source: str) -> None:
    query, key = tensors()
    fused = AttentionCall("a", query=query, key=key, mask=KEEP)
    call = AttentionCall("a", **{source: fused.logits() if source == "scores" else fused.weights()})
    assert call.shape == (2, 4, 5, 5)
    assert call.key_valid.tolist() == KEEP[:, 0, 0].tolist()
    assert close(call.weights(), attention_rows(query, key, KEEP))


def test_known_validity_replaces_what_the_mask_says() -> None:
    query, key = tensors()
    known = torch.tensor([[True, False, True, True, True]] * 2)
    call = AttentionCall("a", query=query, key=key, mask=KEEP)
    assert call.with_valid(queries=known).query_valid is known
    assert call.with_valid(queries=known).key_valid.tolist() == KEEP[:, 0, 0].tolist()
    assert call.with_valid(keys=known).key_valid is known


def test_recorded_rows_that_are_not_a_number_are_invalid() -> None:
    recorded = torch.tensor([[[[0.5, 0.5], [math.nan, math.nan]]]])
    call = AttentionCall("a", recorded=recorded)
    assert call.weights().tolist() == [[[[0.5, 0.5], [0.0, 0.0]]]]
    assert call.allowed().tolist() == [[[[True, True], [False, False]]]]


@pytest.mark.parametrize(
    ("sources", "got"),
    [
        ({}, "none"),
        ({"query": True}, "`query`"),
        ({"key": True}, "`key`"),
        ({"scores": True, "recorded": True}, "`scores`, `recorded`"),
        ({"query": True, "key": True, "scores": True}, "`query`, `key`, `scores`"),
    ],
)
def test_a_call_has_exactly_one_source(sources: dict[str, bool], got: str) -> None:
    with pytest.raises(ValueError, match=f"needs `query` and `key`, or `scores`, or `recorded`; got {got}\\."):
        AttentionCall("a", **dict.fromkeys(sources, torch.zeros(1, 1, 2, 2)))


def test_a_uniform_row_is_known_by_hand() -> None:
    weights = AttentionCall("a", query=torch.zeros(1, 1, 2, 4), key=torch.randn(1, 1, 4, 4)).weights()
    assert np.allclose(weights, 0.25)


def every_source() -> dict[str, AttentionCall]:
    query, key = tensors(key_heads=2)
    fused = AttentionCall("a", query=query, key=key, mask=KEEP, is_causal=True)
    lengths = torch.tensor([5, 3])
    return {
        "fused": fused,
        "one mask for all": AttentionCall("a", query=query, key=key, mask=MASKS["float alibi"]),
        "scores": AttentionCall("a", scores=fused.logits()),
        "recorded": AttentionCall("a", recorded=fused.weights()),
        "flex": AttentionCall(
            "a",
            query=query,
            key=key,
            score_mod=lambda score, b, h, q, k: score + b * k,
            mask_mod=lambda b, h, q, k: k < lengths[b],
        ),
        "known": fused.with_valid(torch.rand(2, 5) > 0.5, torch.rand(2, 5) > 0.5),
    }


@pytest.mark.parametrize("source", every_source())
def test_one_sample_of_a_call_is_that_sample(source: str) -> None:
    call = every_source()[source]
    for sample in range(2):
        one = call.select(sample)
        assert one.shape == (1, *call.shape[1:])
        assert torch.allclose(one.weights(), call.weights()[sample : sample + 1], atol=1e-6)
        assert torch.equal(one.query_valid, call.query_valid[sample : sample + 1])
        assert torch.equal(one.key_valid, call.key_valid[sample : sample + 1])
    with pytest.raises(ValueError, match="`sample` must be at least 0 and below the batch size 2, got 2"):
        call.select(2)


@pytest.mark.parametrize("source", every_source())
@pytest.mark.parametrize(("parts", "of_keys"), [(1, 1), (2, 3), (5, 5), (3, 5)])
def test_buckets_hold_means_over_queries_and_sums_over_keys(source: str, parts: int, of_keys: int) -> None:
    call = every_source()[source]
    weights, valid = call.weights().double().numpy(), call.query_valid.numpy()
    expected = np.zeros((2, 4, parts, of_keys))
    for b, h, p in np.ndindex(2, 4, parts):
        own = [i for i in range(5) if i * parts // 5 == p and valid[b, i] and weights[b, h, i].sum() > 0]
        for j in range(5):
            expected[b, h, p, j * of_keys // 5] += sum(weights[b, h, i, j] for i in own) / max(len(own), 1)
    assert close(call.bucketed_weights(parts, of_keys), expected)


def test_buckets_of_a_long_sequence_come_from_chunks_of_rows() -> None:
    query, key = torch.randn(1, 1, 600, 4), torch.randn(1, 1, 600, 4)
    call = AttentionCall("a", query=query, key=key)
    expected = call.weights().view(1, 1, 4, 150, 4, 150).sum(dim=-1).mean(dim=3)
    assert torch.allclose(call.bucketed_weights(4, 4), expected, atol=1e-6)


def test_there_are_at_most_as_many_buckets_as_tokens() -> None:
    query, key = tensors()
    call = AttentionCall("a", query=query, key=key)
    with pytest.raises(ValueError, match=r"at most \(queries, keys\) = \(5, 5\), got \(6, 1\)"):
        call.bucketed_weights(6, 1)
    with pytest.raises(ValueError, match="`key_buckets` must be at least 1, got 0"):
        call.bucketed_weights(1, 0)
