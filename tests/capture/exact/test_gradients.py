"""Gradients equal those through the full matrix; without a graph there is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attn_callbacks.capture import AttentionCall
from tests.capture.exact.cases import additive, attention, chance, is_square, noise, padding, triangle, window
from tests.capture.exact.differentiable import ONLY_SQUARE, PAIRS

DOUBLE = {"dtype": torch.float64, "heads": 2, "width": 3}
SMALL: dict[str, Callable[[], AttentionCall]] = {
    "plain": lambda: attention(4, **DOUBLE),
    "causal": lambda: attention(4, is_causal=True, **DOUBLE),
    "padding": lambda: attention(4, mask=padding(length=4, pads=2), **DOUBLE),
    "causal, padding left": lambda: attention(4, is_causal=True, mask=padding("left", 4, 2), **DOUBLE),
    "grouped heads": lambda: attention(4, key_heads=1, is_causal=True, **DOUBLE),
    "pairs": lambda: attention(5, mask=chance(2, 2, 5, 5, share=0.5), **DOUBLE),
    "cross": lambda: attention(3, 5, is_cross=True, mask=padding(length=5, pads=2), **DOUBLE),
}
LARGER: dict[str, Callable[[], AttentionCall]] = {
    "plain": lambda: attention(33),
    "causal, padding left": lambda: attention(33, is_causal=True, mask=padding("left", 33, 9)),
    "triangle": lambda: attention(33, mask=triangle(33) & padding("left", 33, 9), key_heads=2),
    "window": lambda: attention(33, mask=window(4, 33), width=20),
    "float padding": lambda: attention(33, mask=additive(padding("left", 33, 9), torch.finfo(torch.float32).min)),
    "key bias": lambda: attention(33, mask=noise(1, 4, 1, 33)),
    "flex": lambda: attention(33, mask_mod=lambda b, h, q, k: q >= k),
    "long": lambda: attention(270, batch=1, heads=1, is_causal=True),
    "cross": lambda: attention(9, 33, is_cross=True, mask=padding(length=33, pads=12)),
}


def learned(call: AttentionCall) -> AttentionCall:
    return replace(call, query=call.query.detach().requires_grad_(), key=call.key.detach().requires_grad_())


def skip_unless_asked(name: str, call: AttentionCall) -> None:
    if name.startswith(ONLY_SQUARE) and not is_square(call):
        pytest.skip("of self-attention only")


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("case", SMALL)
def test_gradients_are_those_of_finite_differences(case: str, name: str) -> None:
    call = learned(SMALL[case]())
    skip_unless_asked(name, call)
    ask = PAIRS[name][0]
    assert torch.autograd.gradcheck(
        lambda q, k: ask(replace(call, query=q, key=k)), (call.query, call.key), fast_mode=True
    )


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("case", LARGER)
def test_gradients_are_those_through_the_full_matrix(case: str, name: str) -> None:
    call = learned(LARGER[case]())
    skip_unless_asked(name, call)
    got, expected = (ask(call) for ask in PAIRS[name])
    unit = expected.detach().abs().max().clamp_min(1.0)
    assert torch.allclose(got / unit, expected / unit, atol=1e-5)
    towards = noise(*got.shape, seed=5)
    ours, full = (torch.autograd.grad((one * towards).sum(), (call.query, call.key)) for one in (got, expected))
    for a, b in zip(ours, full, strict=True):
        assert a.isfinite().all()
        assert (a - b).abs().max() <= 2e-5 * b.abs().max().clamp_min(1.0)


@pytest.mark.parametrize("name", ["entropy", "renyi 2", "logsumexp", "expectation", "mean distance", "received"])
@pytest.mark.parametrize("rank", [(1, 4, 1, 13), (2, 1, 13, 13), (1, 4, 13, 13)])
def test_gradients_reach_a_learned_bias(name: str, rank: tuple[int, ...]) -> None:
    bias = noise(*rank).requires_grad_()
    call = replace(learned(attention()), mask=bias)
    got, expected = (ask(call) for ask in PAIRS[name])
    if got.shape != expected.shape:
        expected = expected[:, :, : got.shape[2]]
    towards = noise(*got.shape, seed=5)
    ours, full = (torch.autograd.grad((one * towards).sum(), (bias, call.query)) for one in (got, expected))
    for a, b in zip(ours, full, strict=True):
        assert (a - b).abs().max() <= 2e-5 * b.abs().max().clamp_min(1.0)


@pytest.mark.parametrize("shape", [(13, 3), (2, 4, 13, 3)])
def test_gradients_reach_the_features(shape: tuple[int, ...]) -> None:
    call, features = learned(attention(is_causal=True, mask=padding())), noise(*shape).requires_grad_()
    towards = noise(2, 4, 13, 3, seed=5)
    alive = call.query_valid[:, None, :, None]
    full = torch.autograd.grad((call.weights() @ features * alive * towards).sum(), (features, call.query, call.key))
    for got in (call.expectation(features), call.entropy_and_expectation(features)[1]):
        ours = torch.autograd.grad((got.values * towards).sum(), (features, call.query, call.key))
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, full, strict=True))


def test_features_alone_may_be_learned() -> None:
    call, features = attention(is_causal=True), noise(13, 3).requires_grad_()
    assert not call.requires_grad
    (got,) = torch.autograd.grad(call.expectation(features).values.sum(), features)
    (full,) = torch.autograd.grad((call.weights() @ features).sum(), features)
    assert torch.allclose(got, full, atol=1e-5)


@pytest.mark.parametrize("source", ["scores", "recorded"])
@pytest.mark.parametrize("name", ["entropy", "renyi 2", "expectation", "mean position", "window 1", "received"])
def test_gradients_reach_a_matrix_that_the_model_made(source: str, name: str) -> None:
    base = attention(is_causal=True, mask=padding("left"))
    given = (base.logits() if source == "scores" else base.weights()).requires_grad_()
    call = AttentionCall("a", **{source: given})
    ask = {
        "entropy": lambda c: c.entropy().values,
        "renyi 2": lambda c: c.renyi_entropy().values,
        "expectation": lambda c: c.expectation(noise(13, 3)).values,
        "mean position": lambda c: c.mean_position().values,
        "window 1": lambda c: c.window_mass(1).values,
        "received": AttentionCall.received_mass,
    }[name]
    (got,) = torch.autograd.grad((ask(call) * noise(*ask(call).shape, seed=5)).sum(), given)
    assert got.isfinite().all()
    assert got.abs().max() > 0


@pytest.mark.parametrize("name", PAIRS)
def test_without_a_graph_there_is_none(name: str) -> None:
    call = learned(attention(is_causal=True))
    ask = PAIRS[name][0]
    assert ask(call).requires_grad
    assert not ask(call.detach()).requires_grad
    with torch.no_grad():
        assert not ask(call).requires_grad
    with torch.inference_mode():
        quiet = ask(call)
    with torch.enable_grad():
        assert torch.allclose(ask(call), quiet, atol=1e-5 * max(1.0, float(quiet.abs().max())))
        assert ask(call).requires_grad


@pytest.mark.parametrize("name", PAIRS)
def test_a_call_seen_in_inference_mode_is_asked_outside(name: str) -> None:
    with torch.inference_mode():
        call = attention(is_causal=True, mask=padding())
        inside = PAIRS[name][0](call)
    outside = PAIRS[name][0](call)
    assert torch.equal(inside, outside)


@pytest.mark.parametrize("name", PAIRS)
def test_mixed_precision_leaves_statistics_alone(name: str) -> None:
    call = learned(attention(is_causal=True, mask=padding()))
    ask = PAIRS[name][0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = ask(call)
    (of_mixed,) = torch.autograd.grad(mixed.square().sum(), call.query)
    (plain,) = torch.autograd.grad(ask(call).square().sum(), call.query)
    assert mixed.dtype == torch.float32
    assert torch.allclose(mixed, ask(call), atol=1e-6)
    assert torch.allclose(of_mixed, plain, atol=1e-5 * float(plain.abs().max().clamp_min(1.0)))


def test_half_precision_gradients_come_back_in_half_precision() -> None:
    call = learned(attention(is_causal=True, dtype=torch.bfloat16))
    (got,) = torch.autograd.grad(call.entropy().mean().sum(), call.query)
    wide = learned(replace(call, query=call.query.float(), key=call.key.float()))
    (full,) = torch.autograd.grad(PAIRS["entropy"][1](wide).mean(dim=-1).sum(), wide.query)
    assert got.dtype == torch.bfloat16
    assert torch.allclose(got.float(), full, atol=1e-2 * float(full.abs().max()))


def test_second_term_of_a_loss_adds_up() -> None:
    """Several statistics of one call in one loss: none may spoil what another saved."""
    call = learned(attention(is_causal=True, mask=padding()))
    names = ("entropy", "window 1", "received", "logsumexp", "mean distance")
    ours = sum(PAIRS[name][0](call).mean() for name in names)
    full = sum(PAIRS[name][1](call).mean() for name in names)
    for a, b in zip(
        torch.autograd.grad(ours, (call.query, call.key)),
        torch.autograd.grad(full, (call.query, call.key)),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-5)


def test_rows_that_do_not_count_give_no_gradient() -> None:
    mask = padding("left") & triangle()
    call = learned(attention(mask=mask))
    loss: Tensor = sum(PAIRS[name][0](call).sum() for name in ("entropy", "renyi 2", "logsumexp", "position variance"))
    query, key = torch.autograd.grad(loss, (call.query, call.key))
    assert query[1, :, :5].eq(0).all()
    assert key[1, :, :5].eq(0).all()
    assert query.isfinite().all()
    assert query[1, :, 6:].abs().max() > 0
