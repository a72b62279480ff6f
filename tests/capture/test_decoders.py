"""Self-attention of a decoder behind an encoder is told from that of an encoder and of a decoder alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attn_callbacks import AttentionRecorder
from tests.capture.reference import SelfAttention, Stack


def decoders(model: nn.Module, *inputs: torch.Tensor, **options: torch.Tensor) -> dict[str, bool]:
    with AttentionRecorder(model) as recorder, torch.no_grad():
        model(*inputs, **options)
    return {call.name: call.is_decoder for call in recorder.calls}


def test_a_decoder_alone_is_none() -> None:
    model = Stack(SelfAttention(8, 2, is_causal=True), SelfAttention(8, 2, is_causal=True))
    assert set(decoders(model, torch.randn(2, 5, 8)).values()) == {False}


def test_an_encoder_is_none() -> None:
    assert set(decoders(Stack(SelfAttention(), SelfAttention()), torch.randn(2, 5, 8)).values()) == {False}


@pytest.mark.parametrize("written_out", [False, True])
def test_transformer(written_out: bool) -> None:
    model = nn.Transformer(8, 2, 2, 2, 16, batch_first=True).eval()
    later = torch.ones(5, 5, dtype=torch.bool).triu(1)
    options = {"tgt_mask": later} if written_out else {}
    found = decoders(model, torch.randn(2, 5, 8), torch.randn(2, 5, 8), **options)
    assert {name for name, is_decoder in found.items() if is_decoder} == {
        f"decoder.layers.{layer}.self_attn" for layer in (0, 1)
    }


@pytest.mark.parametrize("kind", ["T5", "Bart"])
def test_hugging_face(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 8, "vocab_size": 20}
    if kind == "T5":
        config = transformers.T5Config(**sizes, num_layers=2, num_heads=2, d_ff=16, d_kv=4)
    else:
        parts = {f"{side}_{part}": 2 for side in ("encoder", "decoder") for part in ("layers", "attention_heads")}
        config = transformers.BartConfig(**sizes, **parts)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    ids = torch.randint(3, 20, (2, 6))
    found = decoders(model, input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=ids)
    own = {name for name, is_decoder in found.items() if is_decoder}
    assert len(own) == 2
    assert all("decoder" in name and ("SelfAttention" in name or "self_attn" in name) for name in own)


def test_the_next_forward_begins_anew() -> None:
    model = Stack(SelfAttention(8, 2, is_causal=True), SelfAttention(8, 2))
    with AttentionRecorder(model) as recorder, torch.no_grad():
        model(torch.randn(2, 5, 8))
    with recorder, torch.no_grad():
        model(torch.randn(2, 5, 8))
    assert [call.is_decoder for call in recorder.calls] == [False, False]
