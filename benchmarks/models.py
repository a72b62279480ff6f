"""Models of known architectures with random weights: only the time matters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

__all__ = ["bert", "gpt", "twins"]


def bert(tokens: int, attention: str, width: int = 384, layers: int = 6, heads: int = 12) -> Any:
    """An encoder; the defaults are those of MiniLM."""
    config = BertConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=max(tokens, 32),
    )
    model: Any = BertModel
    return model._from_config(config, attn_implementation=attention)


def gpt(tokens: int, attention: str, width: int = 256, layers: int = 4, heads: int = 4) -> Any:
    """A decoder like GPT-2."""
    config = GPT2Config(
        vocab_size=1000,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        n_positions=tokens,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model: Any = GPT2Model
    return model._from_config(config, attn_implementation=attention)


def twins(build: Any, tokens: int, device: str, **sizes: int) -> tuple[nn.Module, nn.Module]:
    """Return one model twice, on fused and on eager attention, in eval mode."""
    fused, eager = (build(tokens, attention, **sizes).eval() for attention in ("sdpa", "eager"))
    eager.load_state_dict(fused.state_dict())
    return fused.to(torch.device(device)), eager.to(torch.device(device))
