from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from attn_callbacks.capture import AttentionRecorder
from tests.capture.reference import EagerAttention, SelfAttention, Stack, left_behind

TOKENS = torch.randn(2, 5, 8)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


class MultiHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.attention(tokens, tokens, tokens, need_weights=False)[0]


NAMES = ["layers.0", "layers.1", "layers.2.attention"]


def compiled(way: str, counter: CompileCounter) -> nn.Module:
    model = Stack(SelfAttention(), EagerAttention(), MultiHead())
    if way == "torch.compile":
        return torch.compile(model, backend=counter)
    if way == "model.compile":
        model.compile(backend=counter)
    elif way == "some layers":
        model.layers[0] = torch.compile(model.layers[0], backend=counter)
        model.layers[2].compile(backend=counter)
    return model


@pytest.mark.parametrize("way", ["torch.compile", "model.compile", "some layers"])
@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.filterwarnings("error:Using `torch.compile")  # torch warns about a recorder's hooks on its wrapper
def test_compiled_models_are_captured_and_not_recompiled(way: str, warm: bool) -> None:
    counter = CompileCounter()
    model = compiled(way, counter)
    expected = model(TOKENS) if warm else None
    graphs = counter.frame_count
    assert (graphs > 0) == warm
    for _ in range(2):
        with AttentionRecorder(model) as recorder:
            output = model(TOKENS)
            output.sum().backward()
        assert [call.name for call in recorder.calls] == NAMES  # without `_orig_mod`
        assert all(call.requires_grad for call in recorder.calls)
        assert counter.frame_count == graphs
        if expected is not None:
            assert torch.equal(output, expected)
    model(TOKENS)
    assert (counter.frame_count == graphs) == warm  # compiled now, if not before
    again = counter.frame_count
    model(TOKENS)
    assert counter.frame_count == again > 0
    assert left_behind() == []


@pytest.mark.filterwarnings("ignore:Using `torch.compile")
def test_a_compiled_model_by_its_own_name_and_the_module_inside() -> None:
    counter = CompileCounter()
    inner = Stack(SelfAttention())
    model = torch.compile(inner, backend=counter)
    model(TOKENS)
    with AttentionRecorder(inner, ["layers.0"]) as recorder:
        model(TOKENS)
    assert [call.name for call in recorder.calls] == ["layers.0"]
    assert counter.frame_count == 1


def test_layers_of_a_compiled_model_are_selected_by_their_plain_names() -> None:
    model = compiled("some layers", CompileCounter())
    with AttentionRecorder(model, ["layers.0", "layers.2"]) as recorder:
        model(TOKENS)
    assert [call.name for call in recorder.calls] == ["layers.0", "layers.2.attention"]


def test_the_callers_own_stance_is_restored() -> None:
    model = Stack(SelfAttention())
    with torch.compiler.set_stance("eager_on_recompile"):
        with AttentionRecorder(model), AttentionRecorder(model):
            model(TOKENS)
        assert torch._dynamo.eval_frame._stance.stance == "eager_on_recompile"


def test_the_stance_is_restored_after_an_exception() -> None:
    model = compiled("torch.compile", CompileCounter())
    with pytest.raises(RuntimeError, match="mat1 and mat2"), AttentionRecorder(model):
        model(TOKENS[..., :3])
    assert left_behind() == []
