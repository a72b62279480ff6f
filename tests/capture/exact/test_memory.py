"""Nothing of size queries x keys is made, in any precision; many heads need no more than some."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from attn_callbacks.capture import AttentionCall, rows
from attn_callbacks.capture.exact import problem
from benchmarks.allocation import peak_bytes
from tests.capture.exact.cases import additive, attention, noise, padding, triangle, window

N = 1024
KINDS: dict[str, Callable[[], AttentionCall]] = {
    "none": lambda: long(),
    "causal": lambda: long(is_causal=True),
    "padding": lambda: long(mask=padding("left", N, 150)[1:]),
    "causal, padding": lambda: long(mask=padding("left", N, 150)[1:], is_causal=True),
    "float padding": lambda: long(mask=additive(padding("right", N, 150)[1:]), is_causal=True),
    "key bias": lambda: long(mask=noise(1, 2, 1, N)),
    "grouped heads": lambda: long(key_heads=1, is_causal=True),
    "cross": lambda: attention(N, N - 50, batch=1, heads=2, is_cross=True),
}
OF_PAIRS: dict[str, Callable[[], AttentionCall]] = {
    "triangle and padding": lambda: long(mask=triangle(N) & padding("left", N, 150)[1:]),
    "sliding window": lambda: long(mask=window(100, N)),
    "window, causal": lambda: long(mask=window(100, N), is_causal=True),
}
ASKED: dict[str, Callable[[AttentionCall], object]] = {
    "logsumexp": AttentionCall.logsumexp,
    "confidence": AttentionCall.confidence,
    "expectation": lambda call: call.expectation(noise(call.shape[3], 8)),
    "entropy": AttentionCall.entropy,
    "entropy and expectation": lambda call: call.entropy_and_expectation(noise(call.shape[3], 8)),
    "renyi": AttentionCall.renyi_entropy,
    "mean position": AttentionCall.mean_position,
    "position variance": AttentionCall.position_variance,
    "mean distance": AttentionCall.mean_distance,
    "window 0": lambda call: call.window_mass(0),
    "window 30": lambda call: call.window_mass(30),
    "window 500": lambda call: call.window_mass(500),
    "window of all": lambda call: call.window_mass(N),
    "far": lambda call: call.far_mass(200),
    "first": lambda call: call.first_mass(4),
    "first of all": lambda call: call.first_mass(N),
    "offset": lambda call: call.offset_mass(-1),
    "received": AttentionCall.received_mass,
    "buckets": lambda call: call.bucketed_weights(16, 16),
    "choices": AttentionCall.choices,
}


def long(tokens: int | None = None, **options: object) -> AttentionCall:
    return attention(tokens or N, **{"batch": 1, "heads": 2, **options})


@pytest.fixture(autouse=True)
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that fills the cache is larger than a map of these lengths."""
    monkeypatch.setattr(problem, "_CACHED", 2**12)


def applies(call: AttentionCall, name: str) -> bool:
    return not (call.is_cross and name.startswith(("mean distance", "window", "far", "offset")))


def peaks(make: Callable[[], AttentionCall]) -> dict[str, int]:
    """Most bytes alive during each question, above those of a map of one head in bool."""
    call = make()
    found = {name: peak_bytes(lambda ask=ask: ask(call)) for name, ask in ASKED.items() if applies(call, name)}
    return {name: peak for name, peak in found.items() if peak >= N * N}


@pytest.mark.parametrize("kind", KINDS)
def test_a_map_of_one_head_would_be_larger(kind: str) -> None:
    assert peaks(KINDS[kind]) == {}


@pytest.mark.parametrize("kind", OF_PAIRS)
def test_a_mask_of_pairs_is_read_in_blocks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_BLOCK_BYTES", 2**16)
    assert peaks(OF_PAIRS[kind]) == {}


@pytest.mark.parametrize("name", ["entropy", "received", "window 30", "first"])
def test_a_mask_function_is_evaluated_in_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_BLOCK_BYTES", 2**18)
    call = long(heads=1, mask_mod=lambda b, h, q, k: q >= k)
    assert peak_bytes(lambda: ASKED[name](call)) < 1.5 * N * N


@pytest.mark.slow
@pytest.mark.parametrize("name", ["entropy", "received", "window 30", "mean distance", "first"])
@pytest.mark.parametrize("kind", ["triangle", "window"])
def test_blocks_are_small_beside_a_long_mask(kind: str, name: str) -> None:
    tokens = 8192
    call = long(tokens, heads=1, mask=triangle(tokens) if kind == "triangle" else window(500, tokens))
    assert peak_bytes(lambda: ASKED[name](call)) < tokens * tokens


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", [name for name in ASKED if name != "choices"])
def test_many_heads_are_taken_one_after_the_other(name: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problem, "_PART_BYTES", 2**18)
    monkeypatch.setattr(rows, "_BLOCK_BYTES", 2**16)
    few, many = (long(64, batch=batch, heads=heads, is_causal=True) for heads in (8, 80))
    answers = [ASKED[name](call) for call in (few, many)]
    answers = [answer[0] if isinstance(answer, tuple) else answer for answer in answers]
    values = [answer if isinstance(answer, torch.Tensor) else answer.values for answer in answers]
    fresh = [long(64, batch=batch, heads=heads, is_causal=True) for heads in (8, 80)]
    small, large = (peak_bytes(lambda call=call: ASKED[name](call)) for call in fresh)
    answer = values[1].nbytes - values[0].nbytes  # grows with the heads, and is held twice: in parts and joined
    assert large - small < 4 * answer + 4 * 2**18


@pytest.mark.parametrize("name", ["entropy", "received", "window 30", "mean distance", "renyi", "far"])
def test_gradients_need_no_map_either(name: str) -> None:
    call = long(is_causal=True)
    call.query.requires_grad_()

    def run() -> None:
        got = ASKED[name](call)
        (got if isinstance(got, torch.Tensor) else got.values).sum().backward()

    assert peak_bytes(run) < 2 * N * N  # bytes: maps of bool of both heads


@pytest.mark.parametrize("name", ["entropy", "received", "window 30", "far"])
def test_nor_do_gradients_under_a_mask_of_pairs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_BLOCK_BYTES", 2**16)
    call = long(mask=window(100, N))
    call.query.requires_grad_()

    def run() -> None:
        got = ASKED[name](call)
        (got if isinstance(got, torch.Tensor) else got.values).sum().backward()

    assert peak_bytes(run) < 4 * N * N  # bytes: one map of float32


@pytest.mark.parametrize("is_causal", [False, True])
def test_known_keys_of_a_long_sequence_take_no_map(is_causal: bool) -> None:
    query = torch.zeros(1, 1, 2**15, 1).expand(1, 12, -1, -1)
    call = AttentionCall("a", query=query, key=query, is_causal=is_causal)
    assert peak_bytes(lambda: call.key_valid) < 2**20


def test_the_meter_sees_a_map() -> None:
    call = long(is_causal=True)
    assert peak_bytes(call.allowed) >= N * N
    assert peak_bytes(call.weights) >= 2 * N * N * 4
