"""Changed outputs of heads, against projections with columns cut out and against gradients of the plain forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError, checkpoint

from attn_callbacks.capture import (
    AttentionCall,
    AttentionNotFoundError,
    AttentionRecorder,
    HeadIntervention,
    call_name,
    gate_heads,
)
from attn_callbacks.functional import gate_gradient
from tests.capture.reference import SelfAttention, left_behind
from tests.capture.zoo import FAMILIES, INPUTS, Family, build

HEADS, WIDTH = 4, 16
TOKENS = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))


class Mixing(nn.Module):
    """Mixes values by a product of its own."""

    def __init__(self, equation: str | None) -> None:
        super().__init__()
        self.equation, self.inner, self.out = equation, nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        heads = self.inner(tokens).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        weights = (heads @ heads.mT).softmax(dim=-1)
        if self.equation is None:
            mixed = (weights @ heads).transpose(1, 2)
        else:
            mixed = torch.einsum(self.equation, weights, heads)
            mixed = mixed if self.equation.endswith("ihd") else mixed.transpose(1, 2)
        return self.out(mixed.flatten(2))


class MultiHead(nn.Module):
    def __init__(self, need_weights: bool, batch_first: bool = True) -> None:
        super().__init__()
        self.need_weights, self.batch_first = need_weights, batch_first
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens if self.batch_first else tokens.transpose(0, 1)
        mask = torch.zeros(2, 5, dtype=torch.bool)
        return self.attention(tokens, tokens, tokens, key_padding_mask=mask, need_weights=self.need_weights)[0]


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "sdpa": lambda: SelfAttention(WIDTH, HEADS),
    "product": lambda: Mixing(None),
    "einsum": lambda: Mixing("bhij,bhjd->bhid"),
    "einsum in another order": lambda: Mixing("bhij,bhjd->bihd"),
    "multi-head": lambda: MultiHead(False),
    "multi-head with weights": lambda: MultiHead(True),
    "multi-head, sequence first": lambda: MultiHead(True, batch_first=False),
    "encoder, training": lambda: encoder().train(),
    "encoder, evaluation": lambda: encoder().eval(),
}


def made(name: str) -> nn.Module:
    torch.manual_seed(1)
    model = MODELS[name]()
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        if isinstance(part, nn.MultiheadAttention):
            part.dropout = 0.0
    return model


def out_of(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    first: Tensor = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
    return first


def gradients_of_gates(model: nn.Module, run: Callable[[], Any], layers: list[str] | None = None) -> None:
    """Gates have the gradients that the plain forward says: a third of the heads' outputs would not."""
    with AttentionRecorder(model, layers) as recorder:
        plain = out_of(run())
    calls = recorder.calls
    probe = torch.randn(plain.shape, generator=torch.Generator().manual_seed(3))
    outputs = [call.output for call in calls]
    used = torch.autograd.grad((plain * probe).sum(), outputs, allow_unused=True)
    expected = {
        call_name(call): gate_gradient(call.output, gradient).reshape(call.shape[:2])
        for call, gradient in zip(calls, used, strict=True)
        if gradient is not None
    }
    gates = {name: torch.ones_like(value).requires_grad_() for name, value in expected.items()}
    with gate_heads(model, gates):
        gated = out_of(run())
    torch.testing.assert_close(gated, plain, rtol=1e-4, atol=1e-5)
    found = torch.autograd.grad((gated * probe).sum(), list(gates.values()))
    for (name, want), got in zip(expected.items(), found, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-3, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", [name for name in MODELS if name != "encoder, evaluation"])
def test_gates_have_the_gradients_of_the_plain_forward(name: str) -> None:
    model = made(name)
    gradients_of_gates(model, lambda: model(TOKENS))
    assert left_behind() == []


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_hugging_face_models(family: Family, kind: str) -> None:
    if kind not in family.kinds:
        pytest.skip("the model has no such attention")
    model = build(family, kind)
    gradients_of_gates(model, lambda: model(**INPUTS[family.inputs]()))


@pytest.mark.parametrize("name", MODELS)
def test_no_heads_no_tokens(name: str) -> None:
    model = made(name)
    with torch.no_grad(), HeadIntervention(model, lambda call: torch.zeros_like(call.output)) as intervention:
        assert intervention.names == ()
        cut = model(TOKENS)
    assert intervention.names
    other = TOKENS.clone()
    other[:, 1:] += 1.0  # what other tokens hold cannot reach the first
    with torch.no_grad(), HeadIntervention(model, lambda call: torch.zeros_like(call.output)):
        torch.testing.assert_close(model(other)[:, 0] if name != "multi-head, sequence first" else model(other)[0],
                                   cut[:, 0] if name != "multi-head, sequence first" else cut[0])  # fmt: skip
    assert not torch.allclose(model(TOKENS), cut)


@pytest.mark.parametrize("need_weights", [True, False])
def test_a_head_that_is_off_is_one_whose_columns_are_cut_from_the_projection(need_weights: bool) -> None:
    model, twin = MultiHead(need_weights), MultiHead(need_weights)
    twin.load_state_dict(model.state_dict())
    size = WIDTH // HEADS
    with torch.no_grad():
        twin.attention.out_proj.weight[:, size : 2 * size] = 0.0
    with gate_heads(model, {"attention": torch.tensor([1.0, 0.0, 1.0, 1.0])}):
        torch.testing.assert_close(model(TOKENS), twin(TOKENS))


def test_gates_of_each_sample() -> None:
    model = made("sdpa")
    gates = torch.rand(2, HEADS)
    with gate_heads(model, {"SelfAttention": gates}):
        both = model(TOKENS)
    for sample in range(2):
        with gate_heads(model, {"SelfAttention": gates[sample]}):
            torch.testing.assert_close(model(TOKENS[sample : sample + 1])[0], both[sample])


def test_grouped_queries_have_gates_of_their_own() -> None:
    class Grouped(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            query, key = tokens.view(2, 5, 4, 4).transpose(1, 2), tokens[..., :8].view(2, 5, 2, 4).transpose(1, 2)
            return F.scaled_dot_product_attention(query, key, key, enable_gqa=True)

    model = Grouped()
    with gate_heads(model, {"Grouped": torch.tensor([1.0, 0.0, 2.0, 1.0])}):
        gated = model(TOKENS)
    torch.testing.assert_close(gated, model(TOKENS) * torch.tensor([1.0, 0.0, 2.0, 1.0])[:, None, None])


def test_flex_attention() -> None:
    flex = pytest.importorskip("torch.nn.attention.flex_attention").flex_attention

    class Flexible(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            heads = tokens.view(2, 5, 4, 4).transpose(1, 2)
            return flex(heads, heads, heads, score_mod=lambda score, b, h, q, k: score + 0.1 * (q - k))

    model = Flexible()
    with gate_heads(model, {"Flexible": torch.tensor([1.0, 0.0, 2.0, 1.0])}):
        gated = model(TOKENS)
    torch.testing.assert_close(gated, model(TOKENS) * torch.tensor([1.0, 0.0, 2.0, 1.0])[:, None, None])


def test_a_module_called_twice_has_two_names() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = SelfAttention(WIDTH, HEADS)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.layer(self.layer(tokens))

    model, seen = Twice(), []
    with HeadIntervention(model, lambda call: seen.append(call_name(call))):
        model(TOKENS)
        model(TOKENS)
    assert seen == ["layer", "layer#1"] * 2
    with gate_heads(model, {"layer#1": torch.zeros(HEADS)}):
        second = model(TOKENS)
    with HeadIntervention(model, lambda call: torch.zeros_like(call.output) if call.index else None):
        assert torch.equal(model(TOKENS), second)


def test_recorders_inside_see_what_was_changed() -> None:
    model = made("sdpa")
    with (
        AttentionRecorder(model) as before,
        gate_heads(model, {"SelfAttention": torch.zeros(HEADS)}),
        AttentionRecorder(model) as after,
    ):
        model(TOKENS)
    assert float(before.calls[0].output.abs().max()) > 0
    torch.testing.assert_close(before.calls[0].weights(), after.calls[0].weights())


def test_what_the_change_computes_is_not_the_model_s() -> None:
    model = made("sdpa")

    def change(call: AttentionCall) -> Tensor:
        return F.scaled_dot_product_attention(call.output, call.output, call.output)

    with AttentionRecorder(model) as recorder, HeadIntervention(model, change):
        model(TOKENS)
    assert len(recorder.calls) == 1


def test_half_precision_stays_half() -> None:
    model = made("multi-head").bfloat16()
    with gate_heads(model, {"attention": torch.tensor([1.0, 0.5, 0.0, 1.0])}):
        assert model(TOKENS.bfloat16()).dtype == torch.bfloat16


def test_a_compiled_model_keeps_its_graph() -> None:
    model = nn.Sequential(made("sdpa"))
    compiled = torch.compile(model, backend="eager")
    plain = compiled(TOKENS)
    with gate_heads(compiled, {"0": torch.zeros(HEADS)}):
        assert not torch.equal(compiled(TOKENS), plain)
    assert torch.equal(compiled(TOKENS), plain)


def test_nothing_is_left_after_an_exception() -> None:
    model = made("multi-head with weights")
    with pytest.raises(ZeroDivisionError), HeadIntervention(model, lambda call: 1 / 0):
        model(TOKENS)
    assert left_behind() == []
    assert torch.bmm.__module__ != "attn_callbacks.capture.multi_head"
    before = model(TOKENS)
    assert torch.equal(model(TOKENS), before)


def test_what_is_wrong_is_said() -> None:
    model = made("sdpa")
    with (
        pytest.raises(ValueError, match=r"must return the shape of `call.output`, \(2, 4, 5, 4\), got \(2, 4, 5, 3\)"),
        HeadIntervention(model, lambda call: call.output[..., :3]),
    ):
        model(TOKENS)
    with (
        pytest.raises(ValueError, match=r"must have shape \(heads,\) = \(4,\)"),
        gate_heads(model, {"SelfAttention": torch.ones(3)}),
    ):
        model(TOKENS)
    with (
        pytest.raises(ValueError, match=r"`gates` names no attention call: 'other'\. Known: 'SelfAttention'"),
        gate_heads(model, {"other": torch.ones(4)}),
    ):
        model(TOKENS)
    with (
        pytest.raises(AttentionNotFoundError, match="No attention was seen"),
        HeadIntervention(nn.Linear(WIDTH, 1), lambda call: None) as intervention,
    ):
        intervention.model(TOKENS)
    with pytest.raises(TypeError, match="got the string"):
        HeadIntervention(model, lambda call: None, layers="layer")
    with (
        pytest.raises(RuntimeError, match="already active"),
        HeadIntervention(model, lambda call: None) as intervention,
        intervention,
    ):
        pass


def test_a_forward_that_is_run_again_is_refused() -> None:
    model = made("sdpa")
    with gate_heads(model, {"SelfAttention": torch.zeros(HEADS)}):
        output = checkpoint(model, TOKENS.clone().requires_grad_(), use_reentrant=False)
        with pytest.raises(CheckpointError, match="recomputation"):
            output.sum().backward()


@pytest.mark.parametrize("layers", [None, ["0"], ["*"]])
@pytest.mark.parametrize("name", ["layer", "layers", "1.attention#1", "1", "typo"])
def test_gates_that_are_nobody_s_are_named(name: str, layers: list[str] | None) -> None:
    model = nn.Sequential(made("sdpa"), made("multi-head"))
    gates = {"0": torch.ones(HEADS), name: torch.zeros(HEADS)}
    with (
        pytest.raises(ValueError, match=f"`gates` names no attention call: '{name}'"),
        gate_heads(model, gates, layers),
    ):
        model(TOKENS)
    with gate_heads(model, gates, layers):
        pass  # nothing ran
    with pytest.raises(ZeroDivisionError), gate_heads(model, gates, layers):
        _ = model(TOKENS) / (1 // 0)
    assert left_behind() == []


def test_gates_that_layers_leave_out_are_named() -> None:
    model = nn.Sequential(made("sdpa"), made("sdpa"))
    with pytest.raises(ValueError, match=r"`gates` names no attention call: '1'\. Known: '0'"):  # noqa: SIM117
        with gate_heads(model, {"1": torch.zeros(HEADS)}, ["0"]):
            model(TOKENS)


def test_a_batch_without_samples_is_left_alone() -> None:
    model = made("sdpa")
    with HeadIntervention(model, lambda call: 1 / 0) as intervention:
        assert model(TOKENS[:0]).shape == (0, 5, WIDTH)
    assert intervention.names == ("SelfAttention",)
    with gate_heads(model, {"SelfAttention": torch.zeros(HEADS)}):
        assert model(TOKENS[:0]).shape == (0, 5, WIDTH)
