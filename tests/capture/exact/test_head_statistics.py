"""Head statistics from fused calls against those of all rows of the matrix."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attn_callbacks.capture import AttentionCall, exact_head_statistics
from attn_callbacks.capture.exact import head_statistics as module
from attn_callbacks.functional import STATISTICS, head_statistics, stratified_rows
from tests.capture.exact.cases import CASES

LONG_RANGES = (0.25, 0.1, 3)


def of_all_rows(call: AttentionCall, long_range: float) -> torch.Tensor:
    return head_statistics(
        call.weights(),
        call.logits(),
        allowed=call.allowed(),
        valid=call.query_valid,
        key_valid=call.key_valid,
        long_range=long_range,
        square=not call.is_cross and call.shape[2] == call.shape[3],
    )


def equal(got: torch.Tensor, expected: torch.Tensor) -> None:
    for index, name in enumerate(STATISTICS):
        wrong = (got[..., index] - expected[..., index]).abs()
        assert torch.equal(got[..., index].isnan(), expected[..., index].isnan()), name
        assert (wrong.nan_to_num() <= 2e-5 * max(1.0, float(expected[..., index].nan_to_num().abs().max()))).all(), name


@pytest.mark.parametrize("case", CASES)
def test_fused_calls_give_the_statistics_of_all_rows(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SMALL_BYTES", -1)
    call = CASES[case]()
    if 0 in call.shape:
        return
    for long_range in LONG_RANGES:
        equal(exact_head_statistics(call, None, call.query_valid, long_range), of_all_rows(call, long_range))


@pytest.mark.parametrize("case", CASES)
def test_small_matrices_are_read_as_they_are(case: str) -> None:
    call = CASES[case]()
    if 0 in call.shape:
        return
    rows, drawn = stratified_rows(call.query_valid, 2, torch.Generator())
    equal(exact_head_statistics(call, rows, drawn), of_all_rows(call, 0.25))


def test_the_drawn_rows_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SMALL_BYTES", -1)
    call = AttentionCall("a", query=torch.randn(2, 3, 90, 8), key=torch.randn(2, 3, 90, 8))
    rows, drawn = stratified_rows(call.query_valid, 4, torch.Generator())
    equal(exact_head_statistics(call, rows, drawn), of_all_rows(call, 0.25))


def test_any_additive_bias_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SMALL_BYTES", -1)
    call = AttentionCall(
        "a", query=torch.randn(2, 3, 90, 8), key=torch.randn(2, 3, 90, 8), mask=torch.randn(1, 3, 90, 90)
    )
    assert not call.entropy().is_exact
    rows, drawn = stratified_rows(call.query_valid, 4, torch.Generator())
    equal(exact_head_statistics(call, rows, drawn), of_all_rows(call, 0.25))


def test_a_function_of_scores_leaves_the_drawn_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SMALL_BYTES", -1)
    call = AttentionCall(
        "a",
        query=torch.randn(2, 3, 90, 8),
        key=torch.randn(2, 3, 90, 8),
        score_mod=lambda score, b, h, q, k: 2.0 * torch.tanh(score / 2.0),
    )
    rows, drawn = stratified_rows(call.query_valid, 4, torch.Generator())
    own = replace(call, given_query_valid=torch.zeros(2, 90, dtype=torch.bool).scatter(1, rows, True))
    equal(exact_head_statistics(call, rows, drawn), of_all_rows(own, 0.25))


@pytest.mark.parametrize("mask", ["boolean", "float"])
def test_a_mask_written_out_is_read_once(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Hugging Face writes out costs one look at it, which a GPU waits for once, not one a question."""
    monkeypatch.setattr(module, "_SMALL_BYTES", -1)
    tokens = 1100
    triangle = torch.ones(1, 1, tokens, tokens, dtype=torch.bool).tril()
    floats = torch.zeros(triangle.shape).masked_fill(~triangle, torch.finfo(torch.float32).min)
    query, key = torch.randn(1, 2, tokens, 8), torch.randn(1, 2, tokens, 8)
    call = AttentionCall("a", query=query, key=key, mask=triangle if mask == "boolean" else floats)
    looks: list[str] = []

    class Looks(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            looks.extend([str(func)] * (func is torch.ops.aten._local_scalar_dense.default))
            return func(*args, **(kwargs or {}))

    rows, drawn = stratified_rows(call.query_valid, 4, torch.Generator())
    with Looks():
        got = exact_head_statistics(call, rows, drawn)
    assert len(looks) <= 4
    causal = AttentionCall("a", query=query, key=key, is_causal=True)
    equal(got, exact_head_statistics(causal, rows, drawn))
