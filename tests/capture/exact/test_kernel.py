"""Private kernels are trusted after a check only."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attn_callbacks.capture.exact import kernel
from tests.capture.exact.cases import attention

WRONG = {
    "output": lambda output, logsumexp: (1.01 * output, logsumexp),
    "log-sum-exp": lambda output, logsumexp: (output, logsumexp + 0.01),
    "no log-sum-exp": lambda output, logsumexp: (output, logsumexp * torch.nan),
    "shape": lambda output, logsumexp: (output, logsumexp[..., :-1]),
}


@pytest.fixture(autouse=True)
def forget() -> Any:
    kernel._kernel.cache_clear()
    yield
    kernel._kernel.cache_clear()


@pytest.mark.parametrize("wrong", WRONG)
def test_a_kernel_with_wrong_results_is_not_used(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernel._cpu_flash

    def broken(*arguments: Any) -> Any:
        return WRONG[wrong](*right(*arguments))

    broken.__name__ = "_broken"
    monkeypatch.setattr(kernel, "_cpu_flash", broken)
    call = attention(is_causal=True)
    expected = torch.special.entr(call.weights()).sum(dim=-1)
    with pytest.warns(UserWarning, match="`broken` of torch .* cannot be used on cpu"):
        torch.testing.assert_close(call.entropy().values, expected, rtol=1e-4, atol=1e-5)


def test_each_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checks: list[Any] = []
    check = kernel._trial_error
    monkeypatch.setattr(kernel, "_trial_error", lambda *given: checks.append(given) or check(*given))
    for _ in range(3):
        attention(is_causal=True).entropy()
    assert len(checks) == 1


def test_flash_attention_is_left_out_where_it_means_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU its diagonal begins at the far corner, and it takes 256 columns; here only the choice can be seen."""
    monkeypatch.setattr(kernel, "_trial_error", lambda *_: None)
    half = torch.bfloat16
    assert kernel._kernel("cuda", half, False, True) is kernel._cuda_flash
    assert kernel._kernel("cuda", half, False, False) is kernel._efficient
    assert kernel._kernel("cuda", half, True, False) is kernel._efficient
    assert kernel._kernel("cuda", torch.float32, False, True) is kernel._efficient
    assert kernel._kernel("cuda", torch.float64, False, True) is kernel._in_blocks
    asked: list[bool] = []
    monkeypatch.setattr(kernel, "_kernel", lambda *given: asked.append(given[-1]) or kernel._in_blocks)
    attention(5, 5, is_causal=True).entropy()
    attention(5, 7, is_causal=True).entropy()
    attention(5, 5, width=260).entropy()
    assert asked == [True, False, False]
