"""What the model goes on with: the very tensor whose gradient tells of the heads, at every site."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_callbacks.capture import AttentionCall, AttentionRecorder
from attn_callbacks.functional.importance import gate_gradient
from tests.capture.reference import EagerAttention, SelfAttention, Stack

BATCH, LENGTH, WIDTH, HEADS = 3, 5, 8, 2
TOKENS = torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64)

Run = Callable[[slice], Tensor]
"""Runs a model on some examples of its batch; gives a loss for each of them."""


@contextmanager
def gated(projection: nn.Module, gates: Tensor) -> Iterator[None]:
    """Multiply the heads' outputs, in front of their projection, by ``gates``: ``(heads,)`` or ``(batch, heads)``."""

    def multiply(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        by_head = args[0].unflatten(-1, (gates.shape[-1], -1))
        wide = gates[:, None, :, None] if gates.ndim == 2 else gates[:, None]
        return ((by_head * wide).flatten(-2),)

    with projection.register_forward_pre_hook(multiply):
        yield


def explicit(run: Run, projections: Mapping[str, nn.Module], heads: int, samples: int) -> dict[str, Tensor]:
    """Gradient of a gate on every head, example by example."""
    found: dict[str, list[Tensor]] = {name: [] for name in projections}
    for sample in range(samples):
        gates = {name: torch.ones(heads, dtype=torch.float64, requires_grad=True) for name in projections}
        with ExitStack() as stack:
            for name, projection in projections.items():
                stack.enter_context(gated(projection, gates[name]))
            loss = run(slice(sample, sample + 1)).sum()
        for name, gradient in zip(gates, torch.autograd.grad(loss, list(gates.values())), strict=True):
            found[name].append(gradient)
    return {name: torch.stack(rows) for name, rows in found.items()}


def met(run: Run, model: nn.Module) -> dict[str, Tensor]:
    """The same from one backward over the batch, without a gate anywhere."""
    found: dict[str, Tensor] = {}

    def listen(call: AttentionCall) -> None:
        used, shape = call.output, call.shape[:2]
        assert used is not None
        used.register_hook(
            lambda gradient: found.update({call.name: gate_gradient(used, gradient).detach().reshape(shape)})
        )

    with AttentionRecorder(model, on_call=listen):
        loss = run(slice(None)).sum()
    loss.backward()
    return found


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert sorted(found) == sorted(expected)
    for name, gates in expected.items():
        torch.testing.assert_close(found[name], gates, rtol=1e-6, atol=1e-9)
        assert gates.abs().max() > 1e-4


def classified(model: nn.Module, **options: Any) -> Run:
    return lambda part: model(TOKENS[part], **options).square().flatten(1).sum(dim=1)


@pytest.mark.parametrize("layer", [SelfAttention, EagerAttention])
def test_attention_written_by_hand(layer: type[SelfAttention]) -> None:
    model = Stack(layer(), layer()).double()
    run = classified(model)
    expected = explicit(run, {f"layers.{n}": model.layers[n].out for n in range(2)}, HEADS, BATCH)
    assert_same(met(run, model), expected)


class Gated(nn.Module):
    """Multi-head attention whose output projection can be gated: torch takes its weight, not the module."""

    def __init__(self, need_weights: bool, batch_first: bool = True) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first)
        self.need_weights, self.batch_first = need_weights, batch_first
        self.gates: Tensor | None = None

    def forward(self, tokens: Tensor, memory: Tensor | None = None, **options: Any) -> Tensor:
        memory = tokens if memory is None else memory
        inputs = (tokens, memory, memory)
        inputs = inputs if self.batch_first else tuple(tensor.transpose(0, 1) for tensor in inputs)
        options = {**options, "need_weights": self.need_weights}
        if self.gates is None:
            output = self.attention(*inputs, **options)[0]
        else:
            weight = self.attention.out_proj.weight * self.gates.repeat_interleave(WIDTH // HEADS)
            output = torch.func.functional_call(self.attention, {"out_proj.weight": weight}, inputs, options)[0]
        return output if self.batch_first else output.transpose(0, 1)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("is_cross", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_multi_head_attention(need_weights: bool, batch_first: bool, is_cross: bool, padded: bool) -> None:
    model = Gated(need_weights, batch_first).double()
    memory = torch.randn(BATCH, 7, WIDTH, dtype=torch.float64) if is_cross else TOKENS
    padding = torch.arange(memory.shape[1]) >= torch.tensor([[3], [5], [7]]) if padded else None

    def run(part: slice) -> Tensor:
        options = {"memory": memory[part]} if is_cross else {}
        mask = None if padding is None else padding[part]
        return model(TOKENS[part], key_padding_mask=mask, **options).square().sum(dim=(1, 2))

    expected = []
    for sample in range(BATCH):
        model.gates = torch.ones(HEADS, dtype=torch.float64, requires_grad=True)
        expected += torch.autograd.grad(run(slice(sample, sample + 1)).sum(), model.gates)
    model.gates = None
    assert_same(met(run, model), {"attention": torch.stack(expected)})


def test_encoder_in_train_mode() -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).double().train()
    padding = torch.arange(LENGTH) >= torch.tensor([[3], [5], [4]])
    names = [f"layers.{n}.self_attn" for n in range(2)]

    def run(part: slice, gates: list[Tensor] | None = None) -> Tensor:
        changed = {}
        for name, gate in zip(names, gates or (), strict=False):
            weight = model.get_parameter(f"{name}.out_proj.weight")
            changed[f"{name}.out_proj.weight"] = weight * gate.repeat_interleave(WIDTH // HEADS)
        options = {"src_key_padding_mask": padding[part]}
        output = torch.func.functional_call(model, changed, (TOKENS[part],), options)
        return output.cos().masked_fill(padding[part][..., None], 0.0).sum(dim=(1, 2))

    rows = []
    for sample in range(BATCH):
        gates = [torch.ones(HEADS, dtype=torch.float64, requires_grad=True) for _ in names]
        rows.append(torch.autograd.grad(run(slice(sample, sample + 1), gates).sum(), gates))
    expected = {name: torch.stack(row) for name, row in zip(names, zip(*rows, strict=True), strict=True)}
    assert_same(met(run, model), expected)


@pytest.mark.parametrize("layer", [SelfAttention, EagerAttention])
def test_dropout_acts_on_both_alike(layer: type[SelfAttention]) -> None:
    model = Stack(layer(dropout=0.4), layer(dropout=0.4)).double().train()
    gates = [torch.ones(BATCH, HEADS, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    torch.manual_seed(3)
    with gated(model.layers[0].out, gates[0]), gated(model.layers[1].out, gates[1]):
        loss = model(TOKENS).square().sum()
    expected = torch.autograd.grad(loss, gates)
    torch.manual_seed(3)
    found = met(classified(model), model)
    assert_same(found, {"layers.0": expected[0], "layers.1": expected[1]})


def test_dropout_behind_returned_weights() -> None:
    model = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.4, batch_first=True).double()
    torch.manual_seed(3)
    found = met(lambda _: model(TOKENS, TOKENS, TOKENS)[0].square(), model)["MultiheadAttention"]
    gates = torch.ones(HEADS, dtype=torch.float64, requires_grad=True)
    weight = model.out_proj.weight * gates.repeat_interleave(WIDTH // HEADS)
    torch.manual_seed(3)
    output = torch.func.functional_call(model, {"out_proj.weight": weight}, (TOKENS, TOKENS, TOKENS))[0]
    torch.testing.assert_close(found.sum(dim=0), *torch.autograd.grad(output.square().sum(), gates))


PROJECTIONS = {
    "Bert": lambda name: name.replace("attention.self", "attention.output.dense"),
    "GPT2": lambda name: f"{name}.c_proj",
    "Llama": lambda name: f"{name}.o_proj",
    "T5": lambda name: f"{name}.o",
}


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("family", PROJECTIONS)
def test_hugging_face(family: str, kind: str) -> None:
    zoo = pytest.importorskip("tests.capture.zoo")
    model = zoo.fresh(zoo.BY_NAME[family], kind).double()
    inputs = zoo.INPUTS["pairs" if family == "T5" else "right"]()

    def run(part: slice) -> Tensor:
        hidden = model(**{name: tensor[part] for name, tensor in inputs.items()})[0]
        real = inputs["attention_mask"][part] if family != "T5" else torch.ones(hidden.shape[:2])
        return (hidden.sin() * real[..., None]).sum(dim=(1, 2))

    with AttentionRecorder(model) as recorder:
        run(slice(None))
    projections = {call.name: model.get_submodule(PROJECTIONS[family](call.name)) for call in recorder.calls}
    assert len(projections) == (6 if family == "T5" else 2)
    assert_same(met(run, model), explicit(run, projections, 4, zoo.BATCH))


def recorded(model: nn.Module, *inputs: Any, **options: Any) -> AttentionCall:
    with AttentionRecorder(model) as recorder:
        model(*inputs, **options)
    (call,) = recorder.calls
    return call


class Sdpa(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        self.returned = F.scaled_dot_product_attention(query, key, value, **options)
        return self.returned


@pytest.mark.parametrize("shape", [(2, 4, 5, 8), (2, 5, 8), (2, 3, 4, 5, 8)])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"dropout_p": 0.5}])
def test_the_functions_own_result_untouched(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    model, tensors = Sdpa(), torch.randn(3, *shape, requires_grad=True)
    call = recorded(model, *tensors, **options)
    assert call.output is model.returned
    assert call.output._version == 0  # whoever sees another number knows that it was changed in place


def test_grouped_queries_have_one_output_a_query_head() -> None:
    query, key = torch.randn(2, 4, 5, 8, requires_grad=True), torch.randn(2, 2, 5, 8)
    call = recorded(Sdpa(), query, key, key, enable_gqa=True)
    assert call.output is not None
    assert call.output.shape[:2] == call.shape[:2] == (2, 4)


def test_without_gradients_there_is_no_graph() -> None:
    with torch.no_grad():
        call = recorded(Sdpa(), *torch.randn(3, 2, 4, 5, 8, requires_grad=True))
    assert call.output is not None
    assert not call.output.requires_grad


def test_native_kernels_have_none() -> None:
    model = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    with torch.no_grad():
        call = recorded(model, *[TOKENS.float()] * 3, need_weights=False)
    assert call.output is None


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention() -> None:
    flex = pytest.importorskip("torch.nn.attention.flex_attention").flex_attention

    class Flex(nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return flex(*inputs)

    model, inputs = Flex(), torch.randn(3, 2, 4, 5, 8)
    with torch.no_grad(), AttentionRecorder(model) as recorder:
        returned = model(*inputs)
    (call,) = recorder.calls
    assert call.output is not None
    assert torch.equal(call.output, returned)


def test_a_cut_off_sink_leaves_the_weights_that_were_used() -> None:
    class Sink(SelfAttention):
        def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
            query, key, value = self.project(tokens)
            scores = F.pad(query @ key.mT, (0, 1))
            return self.out((scores.softmax(dim=-1)[..., :-1] @ value).transpose(1, 2).flatten(2))

    model = Sink().double()
    run = classified(model)
    assert_same(met(run, model), explicit(run, {"Sink": model.out}, HEADS, BATCH))


def test_nothing_holds_an_output_after_its_call() -> None:
    gone: list[weakref.ref[Tensor]] = []
    model = Stack(SelfAttention(), EagerAttention(), SelfAttention())

    def listen(call: AttentionCall) -> None:
        assert call.output is not None
        gone.append(weakref.ref(call.output))

    with AttentionRecorder(model, on_call=listen):
        output = model(TOKENS.float())
    gc.collect()
    del output
    assert [reference() for reference in gone] == [None] * 3


@pytest.mark.parametrize("result", ["bhqd", "bqhd"])
def test_products_whose_axes_come_in_another_order(result: str) -> None:
    class Einsum(SelfAttention):
        def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
            query, key, value = self.project(tokens)
            mixed = torch.einsum(f"bhqk,bhkd->{result}", (query @ key.mT).softmax(dim=-1), value)
            return self.out((mixed.transpose(1, 2) if result == "bhqd" else mixed).flatten(2))

    model = Einsum(10, heads=LENGTH).double()  # as many heads as queries: no shape tells them apart
    tokens = torch.randn(BATCH, LENGTH, 10, dtype=torch.float64)

    def run(part: slice) -> Tensor:
        return model(tokens[part]).square().sum(dim=(1, 2))

    assert_same(met(run, model), explicit(run, {"Einsum": model.out}, LENGTH, BATCH))


def test_heads_folded_into_the_batch() -> None:
    class Folded(SelfAttention):
        def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
            query, key, value = self.project(tokens).flatten(1, 2)
            mixed = torch.bmm(torch.bmm(query, key.mT).softmax(dim=-1), value)
            return self.out(mixed.unflatten(0, (len(tokens), -1)).transpose(1, 2).flatten(2))

    model = Folded().double()
    run = classified(model)
    assert_same(met(run, model), explicit(run, {"Folded": model.out}, HEADS, BATCH))


def test_the_product_is_handed_over_where_there_is_one() -> None:
    call = recorded(EagerAttention(), TOKENS.float())
    assert call.output is not None
    assert call.output.shape == (BATCH, HEADS, LENGTH, WIDTH // HEADS)
