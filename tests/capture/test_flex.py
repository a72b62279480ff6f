from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from attn_callbacks.capture import AttentionRecorder
from tests.capture.reference import attention_rows, close

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
SLOPES = torch.tensor([0.5, 0.25, 0.1, 0.0])
SCORE_MODS: dict[str, Callable[..., Tensor] | None] = {
    "none": None,
    "slopes by head": lambda score, b, h, q, k: score - SLOPES[h] * (q - k).abs(),
    "soft cap": lambda score, b, h, q, k: 2.0 * torch.tanh(score / 2.0),
}


class Flex(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: object) -> Tensor:
        return flex_attention(query, key, value, **options)


@pytest.mark.parametrize("score_mod", SCORE_MODS)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("key_heads", [2, 4])
def test_weights_times_values_are_the_kernels_output(score_mod: str, masked: bool, key_heads: int) -> None:
    query, lengths = torch.randn(2, 4, 6, 8), torch.tensor([6, 3])
    key, value = torch.randn(2, 2, key_heads, 6, 8)
    options = {"score_mod": SCORE_MODS[score_mod], "scale": 0.4, "enable_gqa": key_heads != 4}
    if masked:
        keep = lambda b, h, q, k: (q >= k) & (k < lengths[b])  # noqa: E731
        options["block_mask"] = create_block_mask(keep, 2, None, 6, 6, device="cpu")
    model = Flex()
    with torch.no_grad(), AttentionRecorder(model) as recorder:
        output = model(query, key, value, **options)
    (call,) = recorder.calls
    values = value.repeat_interleave(4 // key_heads, dim=1)
    assert torch.allclose(call.weights() @ values, output, atol=1e-5)
    assert call.key_valid.tolist() == ([[True] * 6, [True] * 3 + [False] * 3] if masked else [[True] * 6] * 2)
    if score_mod == "none":
        position = torch.arange(6)
        mask = (position[:, None] >= position) & (position < lengths[:, None])[:, None, None] if masked else None
        assert close(call.weights(), attention_rows(query, key, mask, scale=0.4))


def test_gradients_reach_queries_and_keys_through_a_score_function() -> None:
    query, key = torch.randn(1, 4, 6, 8, requires_grad=True), torch.randn(1, 4, 6, 8)
    model, score_mod = Flex(), SCORE_MODS["soft cap"]
    with AttentionRecorder(model) as recorder, torch.no_grad():
        model(query.detach(), key, key, score_mod=score_mod)  # the kernel has no backward on a CPU
    call = recorder.calls[0]
    assert not call.requires_grad
    got = torch.autograd.grad(replace(call, query=query).weights()[..., 0].sum(), query)[0]
    explicit = (2.0 * torch.tanh(query @ key.mT / 8**0.5 / 2.0)).softmax(dim=-1)
    assert torch.allclose(got, torch.autograd.grad(explicit[..., 0].sum(), query)[0], atol=1e-6)
