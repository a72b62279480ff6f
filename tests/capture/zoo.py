"""Tiny models of many families, with what each takes in, and their own eager attention to compare with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn

BATCH, LENGTH = 2, 10
SHORT = 4  # padded positions of the second sample
COMMON = {"vocab_size": 90, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {**COMMON, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
BERT = {**SMALL, "max_position_embeddings": 40}
LLAMA = {**BERT, "num_key_value_heads": 2, "head_dim": 4}
T5 = {**COMMON, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
BART = {
    **COMMON,
    "d_model": 16,
    "max_position_embeddings": 40,
    "decoder_start_token_id": 2,
    "scale_embedding": False,
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 32),
}
VIT = {**SMALL, "image_size": 12, "patch_size": 4}
SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
SPEECH = {
    **SMALL,
    "conv_dim": [8, 8],
    "conv_kernel": [4, 3],
    "conv_stride": [4, 2],
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
}
CLIP = {
    "text_config": {**BERT, "num_hidden_layers": 2},
    "vision_config": {k: v for k, v in VIT.items() if k not in COMMON},
    "projection_dim": 8,
}


@dataclass(frozen=True, eq=False)
class Family:
    """A model class, its configuration, its inputs."""

    name: str  # the class is `<name>Model`
    config: dict[str, Any] = field(default_factory=dict)
    inputs: str = "right"
    kinds: tuple[str, ...] = ("sdpa", "eager")
    every: int = 1  # the model itself gives the weights of every n-th call only


def tokens(side: str) -> dict[str, Tensor]:
    ids = torch.randint(3, 90, (BATCH, LENGTH), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    if side != "none":
        mask[1, slice(-SHORT, None) if side == "right" else slice(0, SHORT)] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _encoder_decoder() -> dict[str, Tensor]:
    return {**tokens("right"), "decoder_input_ids": tokens("none")["input_ids"][:, :6]}


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


INPUTS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "right": lambda: tokens("right"),
    "left": lambda: tokens("left"),
    "none": lambda: {"input_ids": tokens("none")["input_ids"]},
    "pairs": _encoder_decoder,
    "image": lambda: {"pixel_values": _noise(BATCH, 3, 12, 12)},
    "windows": lambda: {"pixel_values": _noise(BATCH, 3, 16, 16)},
    "audio": lambda: {"input_values": _noise(BATCH, 200)},
    "spectrum": lambda: {
        "input_features": _noise(BATCH, 8, 24),
        "decoder_input_ids": tokens("none")["input_ids"][:, :6],
    },
    "both": lambda: {**tokens("right"), "pixel_values": _noise(BATCH, 3, 12, 12)},
}

FAMILIES = [
    Family("Bert", BERT),
    Family("Roberta", BERT),
    Family("Albert", {**BERT, "embedding_size": 8}),
    Family("Electra", {**BERT, "embedding_size": 8}),
    Family("DistilBert", {**COMMON, "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 32}),
    Family(
        "DebertaV2",
        {**BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
        kinds=("eager",),
    ),
    Family("MPNet", BERT, kinds=("eager",)),
    Family("GPT2", {**COMMON, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 40}, "left"),
    Family("OPT", {**BERT, "ffn_dim": 32, "word_embed_proj_dim": 16}, "left"),
    Family("Bloom", {**COMMON, "hidden_size": 16, "n_layer": 2, "n_head": 4}, "left", kinds=("eager",)),
    Family("Llama", LLAMA, "left"),
    Family("Mistral", {**LLAMA, "sliding_window": 4}, "left"),
    Family("T5", T5, "pairs"),
    Family("Bart", BART, "pairs"),
    Family("ViT", VIT, "image"),
    Family("Whisper", {**BART, "num_mel_bins": 8, "max_source_positions": 12}, "spectrum"),
]
WIDER = [
    Family("XLMRoberta", BERT),
    Family("GPTNeoX", BERT, "left"),
    Family("Qwen2", LLAMA, "left"),
    Family("Qwen3", LLAMA, "left"),
    Family("Gemma2", {**LLAMA, "query_pre_attn_scalar": 4, "sliding_window": 4}, "left", kinds=("eager",)),
    Family("Phi", BERT, "left"),
    Family("Mixtral", {**LLAMA, "num_local_experts": 2, "num_experts_per_tok": 1}, "left"),
    Family(
        "GptOss",
        {**LLAMA, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 4},
        "left",
        kinds=("eager",),
    ),
    Family("MT5", T5, "pairs"),
    Family("Pegasus", BART, "pairs"),
    Family("Marian", BART, "pairs"),
    Family("MBart", BART, "pairs"),
    Family("DeiT", VIT, "image"),
    Family("Dinov2", VIT, "image"),
    Family("Swin", SWIN, "windows", every=2),
    Family("CLIP", CLIP, "both"),
    Family("Wav2Vec2", SPEECH, "audio"),
    Family("Hubert", SPEECH, "audio"),
]


BY_NAME = {family.name: family for family in (*FAMILIES, *WIDER)}


@cache
def build(family: Family, kind: str) -> nn.Module:
    """Build the model in eval mode; the same weights for each kind of attention."""
    return fresh(family, kind)


def fresh(family: Family, kind: str, head: str = "Model") -> nn.Module:
    """Build a model that the test may change."""
    config = getattr(transformers, f"{family.name}Config")(**copy.deepcopy(family.config))
    torch.manual_seed(0)
    model = getattr(transformers, f"{family.name}{head}")._from_config(config, attn_implementation=kind).eval()
    for parameter in model.parameters():  # larger than at the start of training: attention far from uniform
        parameter.data.normal_(std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    if kind != "eager":
        twin = build(family, "eager") if head == "Model" else fresh(family, "eager", head)
        model.load_state_dict(twin.state_dict())
    return model


def own_attention(family: Family, inputs: str | None = None) -> list[Tensor]:
    """What the eager model gives itself, in the order of execution."""
    with torch.no_grad():
        output = build(family, "eager")(**INPUTS[inputs or family.inputs](), output_attentions=True)
    if family.inputs == "both":
        return [*output.vision_model_output.attentions, *output.text_model_output.attentions]
    if "encoder_attentions" in output:
        decoder = zip(output.decoder_attentions, output.cross_attentions, strict=True)
        return [*output.encoder_attentions, *(maps for layer in decoder for maps in layer)]
    return list(output.attentions)
