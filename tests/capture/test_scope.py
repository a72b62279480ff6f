from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_callbacks.capture import AttentionNotFoundError, AttentionRecorder
from tests.capture.reference import EagerAttention, SelfAttention, Stack

TOKENS = torch.randn(2, 5, 8)


def names(model: nn.Module, *inputs: Tensor) -> list[str]:
    with AttentionRecorder(model) as recorder:
        model(*inputs)
    return [call.name for call in recorder.calls]


class Distilled(nn.Module):
    """A student that calls a teacher it does not own."""

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.student, self.teacher = Stack(SelfAttention(), EagerAttention()), [teacher]

    def forward(self, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.teacher[0](tokens)
        return self.student(tokens) - target


class Bare(nn.Module):
    """Attention without parameters of its own."""

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        heads = tokens[:, None]
        return F.scaled_dot_product_attention(heads, heads, heads, mask)[:, 0]


class OnTheFly(SelfAttention):
    """A well-known tutorial makes the module that attends inside the forward."""

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        return Bare()(self.out(tokens), mask)


@pytest.mark.parametrize("layer", [SelfAttention, EagerAttention, Bare])
def test_a_teacher_inside_the_forward_is_not_recorded(layer: type[nn.Module]) -> None:
    teacher = Stack(layer(), layer())
    assert names(Distilled(teacher), TOKENS) == ["student.layers.0", "student.layers.1"]


def test_a_teacher_beside_the_model_is_not_recorded() -> None:
    student, teacher = Stack(SelfAttention()), Stack(SelfAttention(), EagerAttention())
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    with torch.no_grad(), AttentionRecorder(student) as recorder:
        teacher(TOKENS)
        encoder(TOKENS)
        student(TOKENS)
        teacher(TOKENS)
    assert [call.name for call in recorder.calls] == ["layers.0"]


def test_a_teacher_alone_is_not_a_forward_of_the_model() -> None:
    with AttentionRecorder(Stack(SelfAttention())) as recorder:
        Stack(SelfAttention())(TOKENS)
    assert recorder.calls == ()


def test_attention_of_a_module_made_on_the_fly_belongs_to_the_one_around_it() -> None:
    assert names(Stack(OnTheFly(), OnTheFly()), TOKENS) == ["layers.0", "layers.1"]


def test_a_module_called_without_the_model_around_it_keeps_its_name() -> None:
    model = Stack(SelfAttention(), SelfAttention())
    with AttentionRecorder(model) as recorder:
        model.layers[1](TOKENS)
    assert [call.name for call in recorder.calls] == ["layers.1"]


def test_a_module_in_two_places_has_the_first_name() -> None:
    layer = SelfAttention()
    model = Stack(layer, layer)
    with AttentionRecorder(model) as recorder:
        model(TOKENS)
    assert [(call.name, call.index) for call in recorder.calls] == [("layers.0", 0), ("layers.0", 1)]


def test_attention_in_the_models_own_forward_has_the_name_of_its_class() -> None:
    assert names(Bare(), TOKENS) == ["Bare"]


def test_a_plain_function_inside_the_block_is_the_models() -> None:
    model = Stack(SelfAttention())
    with AttentionRecorder(model) as recorder:
        F.scaled_dot_product_attention(TOKENS, TOKENS, TOKENS)
    assert [call.name for call in recorder.calls] == ["Stack"]


@pytest.mark.parametrize("argument", ["key_value_states", "encoder_hidden_states", "context", "memory"])
@pytest.mark.parametrize("as_keyword", [True, False])
def test_the_other_sequence_is_known_by_the_name_of_its_argument(argument: str, as_keyword: bool) -> None:
    source = f"""
class Cross(nn.Module):
    def forward(self, tokens, {argument}=None):
        other = tokens if {argument} is None else {argument}
        return F.scaled_dot_product_attention(tokens[:, None], other[:, None], other[:, None])
"""
    namespace = {"nn": nn, "F": F}
    exec(source, namespace)
    model, memory = namespace["Cross"](), torch.randn(2, 5, 8)
    with AttentionRecorder(model) as recorder:
        model(TOKENS, **{argument: memory}) if as_keyword else model(TOKENS, memory)
        model(tokens=TOKENS, **{argument: memory})
        model(TOKENS)
        model(TOKENS, TOKENS)
    assert [call.is_cross for call in recorder.calls] == [True, True, False, False]


def test_a_model_without_attention_inside_one_with_it_is_not_found() -> None:
    model = Stack(SelfAttention())
    with pytest.raises(AttentionNotFoundError, match="`Linear`"), AttentionRecorder(model.head):
        model(TOKENS)
