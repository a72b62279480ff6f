from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from attn_callbacks.capture import AttentionCall, AttentionNotFoundError, AttentionRecorder, record
from tests.capture.reference import EagerAttention, SelfAttention, Stack, attention_rows, close


class Kernel(nn.Module):
    """The fused function, imported by name, with any arguments."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: object) -> Tensor:
        return scaled_dot_product_attention(query, key, value, **options)


def captured(query: Tensor, key: Tensor, **options: object) -> AttentionCall:
    module, value = Kernel(), torch.randn_like(key)
    plain = module(query, key, value, **options)
    with AttentionRecorder(module) as recorder:
        output = module(query, key, value, **options)
    assert torch.equal(
        plain,
        output,
    ) or torch.equal(plain.isnan(), output.isnan())
    (call,) = recorder.calls
    assert call.name == "Kernel"
    return call


def test_arguments_arrive_as_the_kernel_gets_them() -> None:
    query, key, mask = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 6, 8), torch.rand(2, 1, 5, 6) > 0.3
    call = captured(query, key, attn_mask=mask, scale=0.3, enable_gqa=True)
    assert torch.equal(call.query, query)
    assert torch.equal(call.key, key)
    assert torch.equal(call.mask, mask)
    assert (call.scale, call.enable_gqa, call.is_causal, call.is_cross) == (0.3, True, False, False)
    assert close(call.weights(), attention_rows(query, key, mask, scale=0.3))


def test_positional_and_keyword_arguments_mean_the_same() -> None:
    query = torch.randn(1, 2, 5, 8)
    mask = torch.ones(5, 5).tril().bool()

    class Positional(nn.Module):
        def forward(self) -> None:
            F.scaled_dot_product_attention(query, query, query, mask, 0.0, False)
            F.scaled_dot_product_attention(query=query, key=query, value=query, attn_mask=mask, is_causal=False)
            F.scaled_dot_product_attention(query, query, value=query, is_causal=True)

    with AttentionRecorder(Positional()) as recorder:
        recorder.model()
    assert len(recorder.calls) == 3
    assert all(close(call.weights(), attention_rows(query, query, mask[None, None])) for call in recorder.calls)


@pytest.mark.parametrize("mask_shape", [None, (5, 6), (2, 5, 6), (1, 5, 6), (2, 1, 6)])
def test_three_axes_are_a_batch_of_single_heads(mask_shape: tuple[int, ...] | None) -> None:
    query, key = torch.randn(2, 5, 8), torch.randn(2, 6, 8)
    mask = None if mask_shape is None else torch.rand(mask_shape) > 0.3
    call = captured(query, key, attn_mask=mask)
    full = None if mask is None else mask.expand(2, 5, 6)[:, None]
    assert close(call.weights(), attention_rows(query[:, None], key[:, None], full))


@pytest.mark.parametrize("mask_shape", [None, (5, 6), (5, 1, 5, 6), (5, 2, 5, 6), (3, 1, 1, 5, 6), (3, 5, 2, 1, 6)])
def test_five_axes_fold_into_the_batch(mask_shape: tuple[int, ...] | None) -> None:
    query, key = torch.randn(3, 5, 2, 5, 8), torch.randn(3, 5, 2, 6, 8)
    mask = None if mask_shape is None else torch.randn(mask_shape)
    call = captured(query, key, attn_mask=mask)
    full = None if mask is None else mask.expand(3, 5, 2, 5, 6).flatten(0, 1)
    assert close(call.weights(), attention_rows(query.flatten(0, 1), key.flatten(0, 1), full))


@pytest.mark.parametrize("queries", [3, 6, 9])
@pytest.mark.parametrize("lower_right", [False, True])
def test_causal_bias_objects_become_their_triangle(queries: int, lower_right: bool) -> None:
    query, key = torch.randn(1, 2, queries, 8), torch.randn(1, 2, 6, 8)
    bias = (causal_lower_right if lower_right else causal_upper_left)(queries, 6)
    call = captured(query, key, attn_mask=bias)
    offset = 6 - queries if lower_right else 0
    triangle = torch.tensor([[j <= i + offset for j in range(6)] for i in range(queries)])
    assert close(call.weights(), attention_rows(query, key, triangle[None, None]))


def test_mask_and_is_causal_together_are_both_heeded() -> None:
    query = torch.randn(2, 2, 5, 8)
    mask = torch.ones(2, 1, 1, 5).bool()
    mask[1, ..., 3:] = False
    call = captured(query, query, attn_mask=mask, is_causal=True)
    assert close(call.weights(), attention_rows(query, query, mask, is_causal=True))


@pytest.mark.parametrize("empty", ["left padding", "all"])
def test_queries_without_keys_are_zero(empty: str) -> None:
    query = torch.randn(2, 2, 4, 8)
    mask = torch.ones(2, 1, 4, 4).tril().bool()
    mask[1, ..., : 2 if empty == "left padding" else 4] = False
    call = captured(query, query, attn_mask=mask)
    assert close(call.weights(), attention_rows(query, query, mask))
    assert call.query_valid[1].tolist() == [False, False, empty != "all", empty != "all"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_measured_in_float32(dtype: torch.dtype) -> None:
    layer, tokens = SelfAttention().to(dtype), torch.randn(2, 5, 8, dtype=dtype)
    with torch.no_grad():
        plain = layer(tokens)
        with AttentionRecorder(layer) as recorder:
            assert torch.equal(layer(tokens), plain)
    (call,) = recorder.calls
    assert call.query.dtype == dtype
    assert call.weights().dtype == torch.float32
    assert close(call.weights(), attention_rows(call.query, call.key))


@pytest.mark.parametrize("layer", [SelfAttention(), EagerAttention(), nn.MultiheadAttention(8, 2, batch_first=True)])
def test_autocast_changes_nothing_but_the_dtype_of_the_parts(layer: nn.Module) -> None:
    tokens = torch.randn(2, 5, 8)
    inputs = (tokens,) * 3 if isinstance(layer, nn.MultiheadAttention) else (tokens,)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = layer(*inputs)
        with AttentionRecorder(layer) as recorder:
            output = layer(*inputs)
        weights = recorder.calls[0].weights()
    assert torch.equal(plain[0], output[0])
    assert weights.dtype == torch.float32
    assert torch.allclose(weights.sum(dim=-1), torch.ones(2, 2, 5), atol=1e-6)
    assert torch.equal(weights, recorder.calls[0].weights())


def test_double_precision_models_are_measured_in_double() -> None:
    layer, tokens = SelfAttention().double(), torch.randn(2, 5, 8, dtype=torch.double)
    with AttentionRecorder(layer) as recorder:
        layer(tokens)
    (call,) = recorder.calls
    assert close(call.weights(), attention_rows(call.query, call.key), 1e-14)


def training_step(model: nn.Module, recorder: AttentionRecorder | None) -> list[Tensor]:
    torch.manual_seed(1)
    model.zero_grad()
    tokens = torch.randn(2, 5, 8, requires_grad=True)
    if recorder is None:
        output = model(tokens)
    else:
        with recorder:
            output = model(tokens)
    output.square().sum().backward()
    return [output, tokens.grad, torch.get_rng_state(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("attention", [SelfAttention, EagerAttention])
def test_output_gradients_and_random_numbers_stay_bit_identical(attention: type[SelfAttention]) -> None:
    model = Stack(*(attention(dropout=0.5) for _ in range(3))).train()
    plain = training_step(model, None)
    recorder = AttentionRecorder(model)
    seen = training_step(model, recorder)
    assert all(torch.equal(a, b) for a, b in zip(plain, seen, strict=True))
    assert [call.name for call in recorder.calls] == ["layers.0", "layers.1", "layers.2"]


@pytest.mark.parametrize("attention", [SelfAttention, EagerAttention])
def test_weights_carry_the_gradient_of_the_training_forward(attention: type[SelfAttention]) -> None:
    layer, tokens, wanted = attention(dropout=0.5).train(), torch.randn(2, 5, 8), torch.randn(2, 2, 5, 5)
    with AttentionRecorder(layer) as recorder:
        layer(tokens)
    assert recorder.calls[0].requires_grad
    (recorder.calls[0].weights() * wanted).sum().backward()
    got = layer.qkv.weight.grad
    query, key, _ = layer.project(tokens)
    explicit = ((query @ key.mT / 2).softmax(dim=-1) * wanted).sum()
    assert torch.allclose(got, torch.autograd.grad(explicit, layer.qkv.weight)[0], atol=1e-6)


class LearnedBias(nn.Module):
    """Under no_grad, results carry no graph but parameters still ask for gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.query = nn.Parameter(torch.zeros(1, 2, 5, 5)), nn.Parameter(torch.randn(1, 2, 5, 8))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.query, tokens, tokens, self.bias)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("layer", [SelfAttention(), EagerAttention(), LearnedBias()], ids=lambda m: type(m).__name__)
def test_weights_are_detached_when_the_forward_had_no_gradients(layer: nn.Module, guard: type[torch.no_grad]) -> None:
    tokens = torch.randn(1, 2, 5, 8) if isinstance(layer, LearnedBias) else torch.randn(2, 5, 8)
    with guard(), AttentionRecorder(layer) as recorder:
        layer(tokens)
    assert not recorder.calls[0].requires_grad
    assert not recorder.calls[0].weights().requires_grad


class Checkpointed(nn.Module):
    def __init__(self, layer: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.layer, self.use_reentrant = layer, use_reentrant

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        return checkpoint(self.layer, tokens, mask, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("attention", [SelfAttention, EagerAttention])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_attention_counts_once(attention: type[SelfAttention], use_reentrant: bool) -> None:
    model = Stack(*(Checkpointed(attention(), use_reentrant) for _ in range(2)))
    tokens = torch.randn(2, 5, 8, requires_grad=True)
    model(tokens).sum().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with AttentionRecorder(model) as recorder:
        model(tokens).sum().backward()
    assert [(call.name, call.index) for call in recorder.calls] == [("layers.0.layer", 0), ("layers.1.layer", 0)]
    assert all(torch.equal(a, p.grad) for a, p in zip(plain, model.parameters(), strict=True))
    # the reentrant form runs its forward without gradients: a loss on these weights would be constant
    assert [call.requires_grad for call in recorder.calls] == [not use_reentrant] * 2


class Recording(nn.Module):
    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        weights = (tokens @ tokens.mT).sigmoid()
        record("sigmoid", weights[:, None])
        return weights @ tokens


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_records_count_once(use_reentrant: bool) -> None:
    model = Checkpointed(Recording(), use_reentrant)
    with AttentionRecorder(model) as recorder:
        model(torch.randn(2, 5, 8, requires_grad=True)).sum().backward()
    assert [(call.name, call.index) for call in recorder.calls] == [("layer.sigmoid", 0)]


def test_gradients_through_non_reentrant_checkpoints_are_those_without() -> None:
    layer, tokens = SelfAttention(), torch.randn(2, 5, 8)
    grads = []
    for model in (layer, Checkpointed(layer, use_reentrant=False)):
        layer.zero_grad()
        with AttentionRecorder(model) as recorder:
            output = model(tokens)
        (output.sum() + recorder.calls[0].weights()[..., 0].sum()).backward()
        grads.append(layer.qkv.weight.grad.clone())
    assert torch.allclose(*grads, atol=1e-6)


def test_nested_tensors_are_not_mistaken_for_regular_ones() -> None:
    query = torch.nested.nested_tensor([torch.randn(2, 3, 8), torch.randn(2, 5, 8)], layout=torch.strided)
    with pytest.raises(AttentionNotFoundError), AttentionRecorder(Kernel()) as recorder:
        recorder.model(query, query, query)


def test_another_mode_around_changes_nothing() -> None:
    layer, tokens = SelfAttention(), torch.randn(2, 5, 8)
    plain = layer(tokens)
    with torch.device("cpu"), AttentionRecorder(layer) as recorder, torch.device("cpu"):
        assert torch.equal(layer(tokens), plain)
    assert len(recorder.calls) == 1


def test_cached_decoding_sees_all_keys() -> None:
    query, key = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 7, 8)
    call = captured(query, key)
    assert call.shape == (1, 2, 1, 7)
    assert close(call.weights(), attention_rows(query, key))
    assert call.query_valid.tolist() == [[True]]


def test_minimum_instead_of_minus_infinity_is_a_mask() -> None:
    query, mask = torch.randn(1, 2, 3, 8), torch.zeros(1, 1, 3, 3)
    mask[..., 1, :] = torch.finfo(torch.float32).min
    call = captured(query, query, attn_mask=mask)
    assert call.weights()[..., 1, :].eq(0).all()
    assert not call.weights().isnan().any()
    assert call.logits()[..., 1, :].eq(-math.inf).all()
