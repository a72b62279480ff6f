"""One arm of the memory benchmark in a process of its own; prints its bytes as JSON.

Run: ``python -m benchmarks.memory_arm NAME TOKENS [THREADS]``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from attn_callbacks.capture import AttentionCall
from benchmarks.allocation import peak_bytes
from benchmarks.resident import Memory, resident_growth

__all__ = ["ARMS", "HEADS", "HEAD_DIM", "LAYERS", "MASKED"]

LAYERS, HEADS, HEAD_DIM = 12, 12, 64
WINDOW = 1024
MASKED = ", mask of pairs"

Run = Callable[[], object]


def one_call(ask: Callable[[AttentionCall], object]) -> Callable[[int], Run]:
    """Ask a causal call of twelve heads; its queries and keys were there before."""

    def prepare(tokens: int) -> Run:
        query, key, value = (torch.randn(1, HEADS, tokens, HEAD_DIM) for _ in range(3))
        return lambda: ask(AttentionCall("attention", query=query, key=key, value=value, is_causal=True))

    return prepare


def masked_call(ask: Callable[[AttentionCall], object]) -> Callable[[int], Run]:
    """Ask a call under a sliding window, as a mask ``(1, 1, tokens, tokens)`` that the model has anyway."""

    def prepare(tokens: int) -> Run:
        query, key, value = (torch.randn(1, HEADS, tokens, HEAD_DIM) for _ in range(3))
        back = torch.arange(tokens)[:, None] - torch.arange(tokens)
        mask = ((back >= 0) & (back < WINDOW))[None, None]
        return lambda: ask(AttentionCall("attention", query=query, key=key, value=value, mask=mask))

    return prepare


def packed(call: AttentionCall) -> object:
    """Entropy and eight features of the keys."""
    entropy, features = call.entropy_and_expectation(torch.rand(call.shape[3], 8))
    return entropy.mean(), features.mean()


def everything(call: AttentionCall) -> object:
    """All exact statistics, one after the other; only the means of heads are kept."""
    return (
        packed(call),
        call.received_mass(),
        call.summary().entropy.mean(),
        call.bucketed_weights(*(min(64, length) for length in call.shape[2:])),
        call.mean_distance().mean(),
        call.window_mass(32).mean(),
    )


def model_output(call: AttentionCall) -> object:
    """What the model itself does: one fused forward."""
    query, key, value = (tensor for tensor in (call.query, call.key, call.value) if tensor is not None)
    return F.scaled_dot_product_attention(query, key, value, call.mask, is_causal=call.is_causal)


def returned_maps(tokens: int) -> Run:
    """A model of twelve layers on eager attention that returns its maps."""
    from benchmarks.models import gpt  # transformers takes seconds, which the other arms need not wait for

    model: Any = gpt(tokens, "eager", 16 * HEADS, LAYERS, HEADS)  # narrow: next to its maps the rest is nothing
    model.eval()
    ids = torch.randint(100, (1, tokens))
    return lambda: model(ids, output_attentions=True).attentions


ARMS: dict[str, Callable[[int], Run]] = {
    "fused forward": one_call(model_output),
    "entropy + 8 features": one_call(packed),
    "received mass": one_call(lambda call: call.received_mass()),
    "64 x 64 map": one_call(lambda call: call.bucketed_weights(*(min(64, length) for length in call.shape[2:]))),
    "mean distance": one_call(lambda call: call.mean_distance().mean()),
    "window mass, 32": one_call(lambda call: call.window_mass(32).mean()),
    "summary": one_call(lambda call: call.summary().entropy.mean()),
    "all exact statistics": one_call(everything),
    f"fused forward{MASKED}": masked_call(model_output),
    f"entropy{MASKED}": masked_call(lambda call: call.entropy().mean()),
    f"all exact statistics{MASKED}": masked_call(everything),
    "returned maps": returned_maps,
}


@torch.no_grad()
def measured(arm: str, tokens: int) -> Memory:
    """Run an arm on few tokens, counted as well: both load code. Then measure it."""
    peak_bytes(ARMS[arm](min(tokens, 128)))
    run, tensors = ARMS[arm](tokens), 0

    def counted() -> None:
        nonlocal tensors
        tensors = peak_bytes(run)

    return Memory(resident_growth(counted), tensors)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]) if len(sys.argv) > 3 else 1)
    torch.manual_seed(0)
    print(json.dumps(measured(sys.argv[1], int(sys.argv[2]))._asdict()))
