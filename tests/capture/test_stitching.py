"""Maps stitched from a generation with a cache equal those of one full forward of what was generated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attn_callbacks.capture import AttentionCall, AttentionRecorder
from attn_callbacks.capture.stitching import computed_call, stitch_calls, stitch_generation

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 64}
SPECIAL = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}


def llama(**options: Any) -> Any:
    config = transformers.LlamaConfig(**{**SIZES, **SPECIAL, "num_key_value_heads": 2, **options})
    return lively(transformers.LlamaForCausalLM(config))


def mistral() -> Any:
    config = transformers.MistralConfig(**{**SIZES, **SPECIAL, "num_key_value_heads": 2, "sliding_window": 4})
    return lively(transformers.MistralForCausalLM(config))


def bart() -> Any:
    sizes = {"encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    start = {"decoder_start_token_id": 2, "forced_eos_token_id": None, "max_position_embeddings": 64}
    config = transformers.BartConfig(vocab_size=40, d_model=32, **sizes, **heads, **SPECIAL, **start)
    return lively(transformers.BartForConditionalGeneration(config))


def t5() -> Any:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(vocab_size=40, decoder_start_token_id=2, **sizes, **SPECIAL)
    return lively(transformers.T5ForConditionalGeneration(config))


def lively(model: nn.Module) -> Any:
    """Weights large enough that attention is not uniform."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture
def prompt() -> tuple[Tensor, Tensor]:
    """Three sequences, two of them padded at the left."""
    ids = torch.randint(3, 40, (3, 6))
    mask = torch.arange(6) >= torch.tensor([0, 2, 3])[:, None]
    return ids * mask, mask.long()


def generate(model: Any, ids: Tensor, mask: Tensor, around: nn.Module | None = None, **options: Any) -> Any:
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, **options}
    calls: list[AttentionCall] = []
    on_call = (lambda call: calls.append(computed_call(call))) if "cache_implementation" in options else calls.append
    with torch.no_grad(), AttentionRecorder(around or model, on_call=on_call):
        output = model.generate(input_ids=ids, attention_mask=mask, **options)
    return calls, output


def decoder_calls(calls: Any) -> list[AttentionCall]:
    return [call for call in calls if "encoder." not in call.name]


def compare(stitched: AttentionCall, full: AttentionCall, rows: Tensor | None = None) -> None:
    """Compare rows of real queries; the last token was generated but never read."""
    found, expected = stitched.weights(), full.weights()
    assert found.shape[2] == expected.shape[2]
    real = full.query_valid if rows is None else rows
    torch.testing.assert_close(
        (found[..., : expected.shape[3]] * real[:, None, :, None]), expected * real[:, None, :, None]
    )
    assert not found[..., expected.shape[3] :].any()
    torch.testing.assert_close(found.sum(dim=-1)[real[:, None].expand(found.shape[:3])].mean(), torch.tensor(1.0))


@pytest.mark.parametrize("make", [llama, mistral])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_decoder_with_padding(make: Any, cache: str, prompt: tuple[Tensor, Tensor]) -> None:
    model, (ids, mask) = make(), prompt
    options = {"cache_implementation": "static"} if cache == "static" else {}
    calls, output = generate(model, ids, mask, **options)
    stitched = stitch_generation(calls)
    read = output.sequences[:, :-1]
    real = torch.cat([mask, torch.ones(3, 5, dtype=torch.long)], dim=1)
    with torch.no_grad(), AttentionRecorder(model) as recorder:
        model(input_ids=read, attention_mask=real)
    assert [call.name for call in stitched] == [call.name for call in recorder.calls]
    for one, full in zip(stitched, recorder.calls, strict=True):
        assert one.shape[2] == 11
        compare(one, full, real.bool())
        assert torch.equal(one.query_valid, real.bool())


@pytest.mark.parametrize("make", [bart, t5])
def test_encoder_decoder(make: Any, prompt: tuple[Tensor, Tensor]) -> None:
    model, (ids, mask) = make(), prompt
    calls, output = generate(model, ids, mask)
    stitched = stitch_generation(calls)
    with torch.no_grad(), AttentionRecorder(model) as recorder:
        model(input_ids=ids, attention_mask=mask, decoder_input_ids=output.sequences[:, :-1])
    full = {call.name: call for call in recorder.calls}
    assert {call.name for call in stitched} == set(full)
    crosses = [call for call in stitched if call.is_cross]
    assert len(crosses) == 2
    for one in decoder_calls(stitched):
        compare(one, full[one.name])
        assert one.is_cross == full[one.name].is_cross
        assert torch.equal(one.key_valid, full[one.name].key_valid)
    assert crosses[0].shape == (3, 4, 6, 6)
    assert torch.equal(crosses[0].key_valid, mask.bool())


class Around(nn.Module):
    """Something whose own forward does not run, as a LightningModule that generates in its step."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def test_recorder_of_something_around_the_model(prompt: tuple[Tensor, Tensor]) -> None:
    model = bart()
    inside = stitch_generation(generate(model, *prompt)[0])
    outside = stitch_generation(generate(model, *prompt, around=Around(model))[0])
    assert [call.name for call in outside] == [f"model.{call.name}" for call in inside]
    for one, other in zip(inside, outside, strict=True):
        assert torch.equal(one.weights(), other.weights())


@pytest.mark.parametrize("make", [bart, llama])
def test_beams_are_followed(make: Any, prompt: tuple[Tensor, Tensor]) -> None:
    model, (ids, mask) = make(), prompt
    calls, output = generate(model, ids, mask, num_beams=3, num_return_sequences=2, output_scores=True)
    beams = output.beam_indices[:, :6]
    assert (beams[:, 1:] != beams[:, :-1]).any()  # some beam was left
    stitched = {call.name: call for call in stitch_generation(decoder_calls(calls), beams)}
    repeated = [tensor.repeat_interleave(2, dim=0) for tensor in (ids, mask)]
    read = output.sequences[:, :-1]
    real = torch.cat([repeated[1], torch.ones(6, 5, dtype=torch.long)], dim=1)
    with torch.no_grad(), AttentionRecorder(model) as recorder:
        if make is bart:
            model(input_ids=repeated[0], attention_mask=repeated[1], decoder_input_ids=read)
        else:
            model(input_ids=read, attention_mask=real)
    for full in decoder_calls(recorder.calls):
        compare(stitched[full.name], full, None if make is bart else real.bool())


def test_rows_after_the_end_of_a_beam_are_zero() -> None:
    calls = [AttentionCall("layer", is_cross=True, recorded=torch.full((2, 1, 1, 3), 1 / 3)) for _ in range(3)]
    stitched = stitch_calls(calls, torch.tensor([[0, 1, -1]]))
    assert stitched.weights().sum(dim=-1).tolist() == [[[1, 1, 0]]]
    assert stitched.query_valid.tolist() == [[True, True, False]]


def test_layers_that_ran_once_stay_as_they_are(prompt: tuple[Tensor, Tensor]) -> None:
    calls, _ = generate(bart(), *prompt)
    encoder = next(call for call in calls if "encoder." in call.name)
    assert stitch_generation(calls)[0] is encoder


def test_shared_layers_keep_their_counts() -> None:
    def call(index: int, queries: int, keys: int, value: float) -> AttentionCall:
        weights = torch.full((1, 1, queries, keys), value)
        return AttentionCall("shared", index, recorded=weights)

    runs = [call(0, 2, 2, 0.1), call(1, 2, 2, 0.2), call(0, 1, 3, 0.1), call(1, 1, 3, 0.2)]
    first, second = stitch_generation(runs)
    assert (first.index, second.index) == (0, 1)
    assert first.weights()[0, 0, 2].tolist() == pytest.approx([0.1] * 3)
    assert second.weights()[0, 0, 2].tolist() == pytest.approx([0.2] * 3)


def test_what_does_not_follow_is_refused(prompt: tuple[Tensor, Tensor]) -> None:
    model = llama()
    calls, _ = generate(model, *prompt, use_cache=False)
    with pytest.raises(ValueError, match="run 1 has no keys but those of its own 7 queries"):
        stitch_generation(calls)
    cross = [AttentionCall("layer", is_cross=True, recorded=torch.zeros(1, 1, 1, keys)) for keys in (3, 4)]
    with pytest.raises(ValueError, match="do not follow on one another: they have 3 to 4 keys"):
        stitch_calls(cross)
    twice = [AttentionCall("layer", recorded=torch.zeros(1, 1, 1, keys)) for keys in (1, 2, 3, 1, 2)]
    with pytest.raises(ValueError, match="3 keys are followed by 1"):
        stitch_calls(twice)
    with pytest.raises(ValueError, match="`calls` holds no attention call"):
        stitch_calls([])
    with pytest.raises(ValueError, match=r"`beams` must have shape \(sequences, 2\)"):
        stitch_calls(twice[:2], torch.zeros(1, 3))


def test_another_batch_is_no_continuation() -> None:
    query = torch.randn(2, 2, 3, 4)
    prompt = AttentionCall("layer", query=query, key=query, is_causal=True)
    step = AttentionCall("layer", query=query[:1, :, :1], key=torch.randn(1, 2, 4, 4))
    with pytest.raises(ValueError, match="do not follow on one another: their batches have 1 to 2 entries"):
        stitch_generation([prompt, step])
