from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_callbacks.capture import AttentionRecorder
from tests.capture.reference import close

TOKENS = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(3))
MEMORY = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(4))
PADDING = torch.zeros(2, 6).bool()
PADDING[1, 4:] = True
CAUSAL = torch.ones(6, 6).triu(1).bool()


def with_weights(module: nn.MultiheadAttention, *inputs: Tensor, **options: object) -> Tensor:
    """The module's own weights of every head, which it gives in a second run."""
    was_training = module.training
    module.eval()  # else after dropout
    with torch.no_grad():
        _, weights = module(*inputs, **{**options, "need_weights": True, "average_attn_weights": False})
    module.train(was_training)
    return weights if weights.ndim == 4 else weights[None]


def _ask(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return args, {**kwargs, "need_weights": True, "average_attn_weights": False}


@contextmanager
def own_weights(model: nn.Module) -> Iterator[list[Tensor]]:
    """Make every nn.MultiheadAttention of a model give its weights, off the native path."""
    torch.backends.mha.set_fastpath_enabled(False)
    maps: list[Tensor] = []
    handles = []
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            handles.append(module.register_forward_pre_hook(_ask, with_kwargs=True))
            handles.append(module.register_forward_hook(lambda m, args, output: maps.append(output[1])))
    yield maps
    torch.backends.mha.set_fastpath_enabled(True)
    for handle in handles:
        handle.remove()


MODULES = {
    "plain": {},
    "no bias": {"bias": False},
    "bias keys": {"add_bias_kv": True},
    "zero key": {"add_zero_attn": True},
    "two more keys": {"add_bias_kv": True, "add_zero_attn": True},
    "other widths": {"kdim": 5, "vdim": 3},
    "dropout": {"dropout": 0.5},
}
MASKS = {
    "none": {},
    "padding": {"key_padding_mask": PADDING},
    "causal": {"attn_mask": CAUSAL},
    "both": {"key_padding_mask": PADDING, "attn_mask": CAUSAL},
    "float": {"attn_mask": torch.randn(6, 6, generator=torch.Generator().manual_seed(1))},
    "float by head": {"attn_mask": torch.randn(4, 6, 6, generator=torch.Generator().manual_seed(1))},
    "float both": {
        "attn_mask": torch.randn(6, 6, generator=torch.Generator().manual_seed(1)),
        "key_padding_mask": torch.zeros(2, 6).masked_fill(PADDING, -math.inf),
    },
    "boolean by head": {"attn_mask": CAUSAL.expand(4, 6, 6)},
}


@pytest.mark.parametrize("options", MODULES.values(), ids=MODULES)
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
def test_weights_equal_those_the_module_gives(options: dict[str, object], masks: dict[str, Tensor]) -> None:
    for batch_first, need_weights, training in itertools.product([True, False], repeat=3):
        module = nn.MultiheadAttention(8, 2, batch_first=batch_first, **options).train(training)
        tokens = TOKENS if batch_first else TOKENS.transpose(0, 1)
        key = value = tokens
        if "kdim" in options:
            key, value = tokens[..., :5], tokens[..., :3]
        inputs = (tokens, key, value)
        expected = with_weights(module, *inputs, **masks)
        for guard in (torch.no_grad, torch.enable_grad):
            torch.manual_seed(1)
            with guard():
                plain = module(*inputs, **masks, need_weights=need_weights)
            torch.manual_seed(1)
            with guard(), AttentionRecorder(module) as recorder:
                output = module(*inputs, **masks, need_weights=need_weights)
            assert torch.equal(plain[0], output[0])
            (call,) = recorder.calls
            assert (call.name, call.is_cross) == ("MultiheadAttention", "kdim" in options)
            assert call.shape == tuple(expected.shape)
            assert close(call.weights(), expected)
            assert call.requires_grad == (guard is torch.enable_grad)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("memory", [MEMORY, TOKENS + 1.0], ids=["shorter", "as long"])
def test_cross_attention(need_weights: bool, memory: Tensor) -> None:
    module = nn.MultiheadAttention(8, 2, batch_first=True)
    with AttentionRecorder(module) as recorder:
        module(TOKENS, memory, memory, need_weights=need_weights)
    (call,) = recorder.calls
    assert call.is_cross
    assert close(call.weights(), with_weights(module, TOKENS, memory, memory))


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_without_a_batch(need_weights: bool, training: bool) -> None:
    module, tokens = nn.MultiheadAttention(8, 2).train(training), TOKENS[0]
    with torch.no_grad(), AttentionRecorder(module) as recorder:
        module(tokens, tokens, tokens, need_weights=need_weights)
    assert close(recorder.calls[0].weights(), with_weights(module, tokens, tokens, tokens))


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_is_not_in_the_weights_but_the_graph_is(need_weights: bool) -> None:
    module = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True).train()
    with AttentionRecorder(module) as recorder:
        module(TOKENS, TOKENS, TOKENS, need_weights=need_weights)
    weights = recorder.calls[0].weights()
    assert close(weights, with_weights(module, TOKENS, TOKENS, TOKENS))
    weights[..., 0].sum().backward()
    assert module.in_proj_weight.grad[:16].abs().sum() > 0
    assert module.in_proj_weight.grad[16:].eq(0).all()  # the values have no part in it


def test_a_backward_hook_does_not_turn_self_attention_into_cross_attention() -> None:
    module = nn.MultiheadAttention(8, 2, batch_first=True)
    module.register_full_backward_hook(lambda *_: None)
    tokens = TOKENS.clone().requires_grad_()
    with AttentionRecorder(module) as recorder:
        module(tokens, tokens, tokens)
        module(tokens, tokens[:, :3], tokens[:, :3])
    assert [call.is_cross for call in recorder.calls] == [False, True]


def encoder(**options: object) -> nn.TransformerEncoder:
    settings = {"d_model": 8, "nhead": 2, "dim_feedforward": 16, "dropout": 0.3, "batch_first": True, **options}
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(**settings), 3, enable_nested_tensor=True)


ENCODERS = {
    "plain": {},
    "norm first": {"norm_first": True},
    "gelu": {"activation": F.gelu},
    "no bias": {"bias": False},
    "odd heads": {"nhead": 1, "d_model": 8},
    "sequence first": {"batch_first": False},
}
ENCODER_MASKS = {
    "none": {},
    "padding": {"src_key_padding_mask": PADDING},
    "causal": {"mask": CAUSAL},
    "both": {"mask": CAUSAL, "src_key_padding_mask": PADDING},
    "float causal": {"mask": torch.zeros(6, 6).masked_fill(CAUSAL, -math.inf)},
    "all short": {"src_key_padding_mask": PADDING | (torch.arange(6) > 4)},  # every sample shorter than the batch
}


@pytest.mark.parametrize("options", ENCODERS.values(), ids=ENCODERS)
@pytest.mark.parametrize("masks", ENCODER_MASKS.values(), ids=ENCODER_MASKS)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True", "ignore:Converting mask without torch.bool")
def test_transformer_encoder(options: dict[str, object], masks: dict[str, Tensor]) -> None:
    model = encoder(**options)
    tokens = TOKENS if options.get("batch_first", True) else TOKENS.transpose(0, 1)
    with torch.no_grad(), own_weights(model.eval()) as expected:
        model(tokens, **masks)
    real = ~masks.get("src_key_padding_mask", torch.zeros(2, 6).bool())
    for training, guard in [
        (False, torch.no_grad),
        (False, torch.inference_mode),
        (False, torch.enable_grad),
        (True, torch.enable_grad),
    ]:
        model.train(training)
        torch.manual_seed(1)
        with guard():
            plain = model(tokens, **masks)
        torch.manual_seed(1)
        with guard(), AttentionRecorder(model) as recorder:
            output = model(tokens, **masks)
        assert torch.equal(plain, output)
        assert [call.name for call in recorder.calls] == [f"layers.{i}.self_attn" for i in range(3)]
        for call, maps in zip(recorder.calls, expected, strict=True):
            assert not call.is_cross
            assert call.shape == tuple(maps.shape)
            assert torch.equal(call.key_valid, real)
            if not training:  # later layers see dropout
                assert close(call.weights() * real[:, None, :, None], maps * real[:, None, :, None])


def test_native_path_is_really_taken_and_seen() -> None:
    model = encoder().eval()
    with torch.no_grad():
        native = model(TOKENS, src_key_padding_mask=PADDING)
        with AttentionRecorder(model):
            seen = model(TOKENS, src_key_padding_mask=PADDING)
    assert native[1, 4:].eq(0).all()  # only the native path puts zeros there
    assert torch.equal(native, seen)


@pytest.mark.filterwarnings("ignore:Converting mask without torch.bool")
def test_native_path_takes_a_bias_for_a_mask_and_so_do_the_weights() -> None:
    layer, bias = encoder().layers[0].eval(), torch.zeros(6, 6)
    bias[:, 3:] = 0.1  # the kernel makes booleans of it
    with torch.no_grad(), AttentionRecorder(layer) as recorder:
        output = layer(TOKENS, src_mask=bias)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            masked, added = layer(TOKENS, src_mask=bias != 0), layer(TOKENS, src_mask=bias)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    assert torch.allclose(output, masked, atol=1e-6)
    assert not torch.allclose(output, added, atol=1e-3)
    native, boolean, biased = (call.weights() for call in recorder.calls)
    assert torch.allclose(native, boolean, atol=1e-6)
    assert not torch.allclose(native, biased, atol=1e-3)


@pytest.mark.parametrize("kind", ["layer", "attention"])
def test_nested_input_is_seen_with_its_lengths(kind: str) -> None:
    layer = encoder().layers[0].eval()
    parts = [TOKENS[0], TOKENS[1, :4]]
    nested = torch.nested.nested_tensor(parts)
    model = layer if kind == "layer" else layer.self_attn
    inputs = (nested,) if kind == "layer" else (nested, nested, nested)
    with torch.no_grad(), AttentionRecorder(model) as recorder:
        model(*inputs)
    (call,) = recorder.calls
    assert torch.equal(call.key_valid, ~PADDING)
    for sample, part in enumerate(parts):
        expected = with_weights(layer.self_attn, *(part[None],) * 3)
        assert close(call.weights()[sample : sample + 1, :, : len(part), : len(part)], expected)


def test_lengths_of_one_batch_are_not_those_of_the_next() -> None:
    model = encoder().eval()
    nested = torch.nested.nested_tensor([torch.randn(9, 8), torch.randn(7, 8)])
    with torch.no_grad(), AttentionRecorder(model) as recorder:
        model(TOKENS, src_key_padding_mask=PADDING | (torch.arange(6) > 4))
        model.layers[0](nested)
        model.layers[0](torch.nested.nested_tensor([torch.randn(3, 8)]))
    assert [call.shape[2:] for call in recorder.calls] == [(6, 6)] * 3 + [(9, 9), (3, 3)]


def test_another_mode_keeps_its_effect_on_the_native_path() -> None:
    model = encoder().eval()
    with torch.no_grad(), torch.device("cpu"):  # a function mode: the native path is left for it
        plain = model(TOKENS, src_key_padding_mask=PADDING)
        with AttentionRecorder(model) as recorder:
            output = model(TOKENS, src_key_padding_mask=PADDING)
    assert not plain[1, 4:].eq(0).all()
    assert torch.equal(plain, output)
    assert len(recorder.calls) == 3


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_transformer_sees_encoder_decoder_and_cross_attention(training: bool, norm_first: bool) -> None:
    model = nn.Transformer(8, 2, 2, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first).eval()
    options = {
        "tgt_mask": torch.ones(4, 4).triu(1).bool(),
        "src_key_padding_mask": PADDING,
        "memory_key_padding_mask": PADDING,
    }
    with torch.no_grad(), own_weights(model) as expected:
        model(TOKENS, MEMORY, **options)
    model.train(training)
    with torch.set_grad_enabled(training):
        plain = model(TOKENS, MEMORY, **options)
        with AttentionRecorder(model) as recorder:
            output = model(TOKENS, MEMORY, **options)
    assert torch.equal(plain, output)
    assert [(call.name, call.is_cross) for call in recorder.calls] == [
        ("encoder.layers.0.self_attn", False),
        ("encoder.layers.1.self_attn", False),
        ("decoder.layers.0.self_attn", False),
        ("decoder.layers.0.multihead_attn", True),
        ("decoder.layers.1.self_attn", False),
        ("decoder.layers.1.multihead_attn", True),
    ]
    for call, maps in zip(recorder.calls, expected, strict=True):
        real = torch.ones(2, 4).bool() if call.name.startswith("decoder") else ~PADDING
        assert close(call.weights() * real[:, None, :, None], maps * real[:, None, :, None])
    assert torch.equal(recorder.calls[3].key_valid, ~PADDING)
    assert recorder.calls[3].query_valid.all()


def test_decoder_alone() -> None:
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), 2).eval()
    with torch.no_grad(), AttentionRecorder(model, ["*.multihead_attn"]) as recorder:
        model(TOKENS, MEMORY)
    assert [call.shape for call in recorder.calls] == [(2, 2, 6, 4)] * 2
    assert all(call.is_cross for call in recorder.calls)


def test_training_gradients_and_random_numbers_stay_bit_identical() -> None:
    model = encoder().train()
    runs = []
    for context in (None, AttentionRecorder(model)):
        model.zero_grad()
        torch.manual_seed(1)
        if context is None:
            output = model(TOKENS, src_key_padding_mask=PADDING)
        else:
            with context:
                output = model(TOKENS, src_key_padding_mask=PADDING)
        output.square().sum().backward()
        runs.append([output, torch.get_rng_state(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
