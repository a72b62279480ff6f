"""What a call remembers is true: whatever could change it makes the call forget."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from attn_callbacks.capture import AttentionCall, rows
from tests.capture.exact.cases import attention

ASKED = ("max_logit", "entropy", "mean_position", "confidence", "first_mass")


@pytest.mark.parametrize("name", ASKED)
def test_a_graph_after_inference(name: str) -> None:
    query, key = (torch.randn(1, 2, 6, 4, requires_grad=True) for _ in range(2))
    call = AttentionCall("a", query=query, key=key)
    with torch.inference_mode():
        before = getattr(call, name)().values.clone()
    after = getattr(call, name)()
    after.values.sum().backward()
    assert query.grad is not None
    assert not after.counted.is_inference()
    torch.testing.assert_close(after.values.detach(), before)


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_that_comes_and_goes(name: str, dtype: torch.dtype) -> None:
    query, key = (torch.randn(1, 2, 6, 4, dtype=dtype) for _ in range(2))
    call = AttentionCall("a", query=query, key=key)
    assert not getattr(call, name)().values.requires_grad
    query.requires_grad_()
    (gradient,) = torch.autograd.grad(getattr(call, name)().values.square().sum(), query)
    assert gradient.shape == query.shape
    query.requires_grad_(False)
    assert not getattr(call, name)().values.requires_grad


def test_a_mask_that_is_learned_from_now_on() -> None:
    mask = torch.zeros(1, 1, 6, 6)
    call = AttentionCall("a", query=torch.randn(1, 2, 6, 4), key=torch.randn(1, 2, 6, 4), mask=mask)
    expected = call.entropy().values
    mask.requires_grad_()
    found = call.entropy().values
    torch.testing.assert_close(found.detach(), expected, rtol=1e-5, atol=1e-5)
    found.square().sum().backward()
    assert mask.grad is not None


@pytest.mark.parametrize("part", ["query", "key", "mask"])
def test_a_change_in_place(part: str) -> None:
    mask = torch.ones(1, 1, 13, 13, dtype=torch.bool)
    call = attention(mask=mask)
    call.summary()
    call.first_mass()
    tensor = getattr(call, part)
    tensor[..., 2] = False if part == "mask" else 3.0
    for answer, expected in ((call.first_mass(), call.weights()[..., 0]), (call.confidence(), call.weights().amax(-1))):
        torch.testing.assert_close(answer.values, expected * answer.counted, rtol=1e-5, atol=1e-6)
    assert bool(call.key_valid[0, 2]) == (part != "mask")


def test_what_is_handed_out_may_be_changed() -> None:
    call = AttentionCall("a", query=torch.randn(2, 1, 4, 8), key=torch.randn(2, 1, 4, 8))
    call.max_logit().counted[:] = False
    call.key_valid[:] = False
    assert call.entropy().counted.all()
    assert call.received_mass().sum() == pytest.approx(8, rel=1e-5)


def test_copies_do_not_remember() -> None:
    call = attention(mask=torch.ones(1, 1, 13, 13, dtype=torch.bool).tril(2))
    call.summary()
    for other in (
        copy.copy(call),
        copy.deepcopy(call),
        pickle.loads(pickle.dumps(call)),
        call.detach(),
        call.select(0),
    ):
        assert "_memory" not in vars(other)
        other.summary()


@pytest.mark.parametrize("name", ["mean_position", "entropy", "received_mass"])
def test_a_change_before_the_backward_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are computed again: with another mask their gradient would be that of something else."""
    monkeypatch.setattr(rows, "_BLOCK_BYTES", 64)
    mask = torch.ones(1, 1, 40, 40, dtype=torch.bool).tril(2)
    query = torch.randn(1, 2, 40, 8, requires_grad=True)
    call = AttentionCall("a", query=query, key=torch.randn(1, 2, 40, 8), mask=mask)
    answer = getattr(call, name)()
    mask.fill_(True)
    with pytest.raises(RuntimeError, match="changed in place"):
        (answer if isinstance(answer, torch.Tensor) else answer.values).sum().backward()
