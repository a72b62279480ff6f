from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from attn_callbacks.capture import AttentionCall, AttentionRecorder  # noqa: E402
from tests.capture import zoo  # noqa: E402
from tests.capture.reference import close, left_behind  # noqa: E402
from tests.capture.zoo import BY_NAME, FAMILIES, INPUTS, SHORT, WIDER, Family, build, fresh, own_attention  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(level)


def cases(families: list[Family]) -> list[object]:
    return [pytest.param(f, kind, id=f"{f.name}-{kind}") for f in families for kind in f.kinds]


def run(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, tuple[AttentionCall, ...]]:
    with AttentionRecorder(model) as recorder:
        output = model(**inputs)[0]
    return output, recorder.calls


def assert_own_attention(calls: tuple[AttentionCall, ...], expected: list[Tensor]) -> None:
    """Equal to 1e-6 on all rows that see a key; others are zero here and arbitrary there."""
    for call, maps in zip(calls, expected, strict=True):
        lives = call.allowed().expand(call.shape).any(dim=-1, keepdim=True)
        assert close(call.weights(), maps * lives)
        assert lives[0].all()


def check(family: Family, kind: str) -> None:
    model, inputs = build(family, kind), INPUTS[family.inputs]()
    with torch.no_grad():
        plain = model(**inputs)[0]
        output, calls = run(model, inputs)
    assert torch.equal(plain, output)
    assert_own_attention(calls[family.every - 1 :: family.every], own_attention(family))
    assert len({(call.name, call.index) for call in calls}) == len(calls)
    modules = dict(model.named_modules())
    assert all(call.name in modules for call in calls)
    if family.inputs in ("left", "right"):
        real = inputs["attention_mask"].bool()
        assert all(torch.equal(call.key_valid, real) and torch.equal(call.query_valid, real) for call in calls)
    if family.inputs in ("pairs", "spectrum"):
        assert [call.is_cross for call in calls] == [False] * 3 + [True, False, True]
    else:
        assert not any(call.is_cross for call in calls)
    if family.inputs == "pairs":
        assert torch.equal(calls[3].key_valid, inputs["attention_mask"].bool())
        assert calls[3].query_valid.all()


@pytest.mark.parametrize(("family", "kind"), cases(FAMILIES))
def test_weights_equal_the_models_own(family: Family, kind: str) -> None:
    check(family, kind)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "kind"), cases(WIDER))
def test_weights_equal_the_models_own_in_more_families(family: Family, kind: str) -> None:
    check(family, kind)


def test_attention_of_the_zoo_is_far_from_uniform() -> None:
    spread = {family.name: max(maps.std(dim=-1).mean() for maps in own_attention(family)) for family in FAMILIES}
    assert min(spread.values()) > 0.02  # else an agreement to 1e-6 would say little


@pytest.mark.parametrize("name", ["GPT2", "Llama", "Mistral"])
def test_decoders_without_padding_take_another_route(name: str) -> None:
    family = BY_NAME[name]
    with torch.no_grad():
        _, calls = run(build(family, "sdpa"), INPUTS["none"]())
    assert_own_attention(calls, own_attention(family, "none"))
    assert calls[0].is_causal == (name != "Mistral")
    assert calls[0].enable_gqa == (calls[0].key.shape[1] != calls[0].query.shape[1])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["Bert", "GPT2", "Llama"])
def test_padding_on_either_side(name: str, side: str) -> None:
    family = BY_NAME[name]
    with torch.no_grad():
        _, calls = run(build(family, "sdpa"), INPUTS[side]())
    assert_own_attention(calls, own_attention(family, side))
    rows = calls[1].weights()[1].sum(dim=-1)  # (heads, queries)
    real = INPUTS[side]()["attention_mask"][1].bool()
    assert torch.allclose(rows[:, real], torch.ones(4, int(real.sum())))
    if side == "left" and name != "Bert":
        assert rows[:, :SHORT].eq(0).all()  # causal, and all keys before them are padding


@pytest.mark.parametrize("name", ["Bert", "Llama", "Mistral", "Bart"])
def test_flex_attention(name: str) -> None:
    family = BY_NAME[name]
    model, inputs = fresh(family, "flex_attention"), INPUTS[family.inputs]()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output, calls = run(model, inputs)
        again, _ = run(model, inputs)
    assert torch.equal(output, again)
    for call, maps in zip(calls, own_attention(family), strict=True):
        lives = call.allowed().any(dim=-1, keepdim=True)
        assert close(call.weights(), maps * lives)
        rows = torch.tensor([[9, 1], [7, 0]]) if call.shape[2] == zoo.LENGTH else torch.tensor([[5, 1], [2, 0]])
        picked = torch.stack([w[:, r] for w, r in zip(call.weights(), rows, strict=True)])
        assert torch.allclose(call.weights(rows), picked, atol=1e-6)
    if name != "Bart":
        assert torch.equal(calls[0].key_valid, inputs["attention_mask"].bool())
    assert left_behind() == []


def loss_and_gradients(model: nn.Module, inputs: dict[str, Tensor], recorder: AttentionRecorder | None) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    if recorder is None:
        output = model(**inputs)[0]
    else:
        with recorder:
            output = model(**inputs)[0]
    output.square().mean().backward()
    return [output, torch.get_rng_state(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["Bert", "Llama", "T5", "DebertaV2", "GPT2"])
def test_training_is_bit_identical_and_weights_carry_gradients(name: str, kind: str) -> None:
    family = BY_NAME[name]
    if kind not in family.kinds:
        pytest.skip("has no fused attention")
    model = fresh(family, kind).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    inputs, recorder = INPUTS[family.inputs](), AttentionRecorder(model)
    plain = loss_and_gradients(model, inputs, None)
    seen = loss_and_gradients(model, inputs, recorder)
    assert len(plain) == len(seen) > 10
    assert all(torch.equal(a, b) for a, b in zip(plain, seen, strict=True))
    assert all(call.requires_grad for call in recorder.calls)


def test_gradients_of_a_loss_on_weights_equal_those_of_the_eager_model() -> None:
    family, gradients = BY_NAME["Bert"], []
    for kind in ("sdpa", "eager"):
        model, inputs = fresh(family, kind), INPUTS["right"]()
        if kind == "eager":
            maps = model(**inputs, output_attentions=True).attentions
        else:
            with AttentionRecorder(model) as recorder:
                model(**inputs)
            maps = [call.weights() for call in recorder.calls]
        loss = sum(m[:, :, :6, 1].square().sum() for m in maps)
        model.zero_grad()
        loss.backward()
        gradients.append([p.grad for p in model.encoder.layer[0].parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 4
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_gradient_checkpointing_counts_once(kind: str, use_reentrant: bool) -> None:
    model, inputs = fresh(BY_NAME["Bert"], kind).train(), INPUTS["right"]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # version 5 has a new name for it
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    with AttentionRecorder(model) as recorder:
        model(**inputs)[0].sum().backward()
    assert [(call.name, call.index) for call in recorder.calls] == [
        (f"encoder.layer.{i}.attention.self", 0) for i in range(2)
    ]
    assert [call.requires_grad for call in recorder.calls] == [not use_reentrant] * 2


def test_a_layer_used_twice_is_counted() -> None:
    with torch.no_grad():
        _, calls = run(build(BY_NAME["Albert"], "sdpa"), INPUTS["right"]())
    name = "encoder.albert_layer_groups.0.albert_layers.0.attention"
    assert [(call.name, call.index) for call in calls] == [(name, 0), (name, 1)]


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_cached_decoding_gives_the_last_rows_of_the_whole(name: str) -> None:
    model, ids = build(BY_NAME[name], "sdpa"), INPUTS["none"]()["input_ids"]
    with torch.no_grad():
        _, whole = run(model, {"input_ids": ids})
        with AttentionRecorder(model) as recorder:
            cache = model(ids[:, :-2], use_cache=True).past_key_values
            for last in (-2, -1):
                cache = model(ids[:, last:][:, :1], past_key_values=cache, use_cache=True).past_key_values
    assert [call.index for call in recorder.calls] == [0] * 6
    assert [call.shape[2:] for call in recorder.calls[::2]] == [(8, 8), (1, 9), (1, 10)]
    for step, call in enumerate(recorder.calls):
        position = 7 + step // 2
        row = whole[step % 2].weights(torch.tensor([position]))[..., : position + 1]
        assert torch.allclose(call.weights()[:, :, -1:], row, atol=1e-5)
        assert call.query_valid.all()
        assert not call.is_cross


@pytest.mark.parametrize("name", ["Llama", "T5"])
def test_generation(name: str) -> None:
    head = "ForCausalLM" if name == "Llama" else "ForConditionalGeneration"
    model, inputs = fresh(BY_NAME[name], "sdpa", head), INPUTS["left"]()
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    plain = model.generate(**inputs, **settings)
    with AttentionRecorder(model) as recorder:
        output = model.generate(**inputs, **settings)
    assert torch.equal(plain, output)
    own = [call for call in recorder.calls if not call.is_cross and "encoder" not in call.name]
    assert [call.shape[3] for call in own[::2]] == ([10, 11, 12, 13] if name == "Llama" else [1, 2, 3, 4])
    assert all(call.index == 0 for call in recorder.calls)
    assert not any(call.requires_grad for call in recorder.calls)
    assert left_behind() == []


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_half_precision(kind: str) -> None:
    model, inputs = fresh(BY_NAME["Llama"], kind).to(torch.bfloat16), INPUTS["left"]()
    with torch.no_grad():
        _, calls = run(model, inputs)
        expected = fresh(BY_NAME["Llama"], "eager").to(torch.bfloat16)(**inputs, output_attentions=True).attentions
    for call, maps in zip(calls, expected, strict=True):
        lives = call.allowed().any(dim=-1, keepdim=True)
        assert call.weights().dtype == torch.float32
        assert torch.allclose(call.weights(), maps.float() * lives, atol=0.02)
        assert torch.equal(call.key_valid, inputs["attention_mask"].bool())


def test_some_layers_of_a_model() -> None:
    model = build(BY_NAME["Bart"], "sdpa")
    with torch.no_grad(), AttentionRecorder(model, ["*.encoder_attn", "encoder.layers.1"]) as recorder:
        model(**INPUTS["pairs"]())
    assert [call.name for call in recorder.calls] == [
        "encoder.layers.1.self_attn",
        "decoder.layers.0.encoder_attn",
        "decoder.layers.1.encoder_attn",
    ]


def test_a_classification_head_is_not_attention() -> None:
    model = fresh(BY_NAME["Bert"], "sdpa", "ForTokenClassification")
    with torch.no_grad(), AttentionRecorder(model) as recorder:
        model(**INPUTS["right"]()).logits.softmax(dim=-1)
    assert [call.name for call in recorder.calls] == [f"bert.encoder.layer.{i}.attention.self" for i in range(2)]


def test_a_router_is_not_attention() -> None:
    model = build(BY_NAME["Mixtral"], "eager")
    with torch.no_grad():
        _, calls = run(model, INPUTS["left"]())
    assert [call.name for call in calls] == ["layers.0.self_attn", "layers.1.self_attn"]


def test_masks_reach_the_call_from_the_model() -> None:
    with torch.no_grad():
        _, calls = run(build(BY_NAME["Mistral"], "sdpa"), INPUTS["none"]())
    window = torch.tensor([[0 <= i - j < 4 for j in range(10)] for i in range(10)])
    assert torch.equal(calls[0].allowed().expand(calls[0].shape)[0, 0], window)
