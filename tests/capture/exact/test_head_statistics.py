"""Head statistics from fused calls against those of all rows of the matrix."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

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


def test_entropies_without_an_identity_come_from_the_drawn_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SMALL_BYTES", -1)
    bias = torch.randn(1, 3, 90, 90)
    call = AttentionCall("a", query=torch.randn(2, 3, 90, 8), key=torch.randn(2, 3, 90, 8), mask=bias)
    rows, drawn = stratified_rows(call.query_valid, 4, torch.Generator())
    own = replace(call, given_query_valid=torch.zeros(2, 90, dtype=torch.bool).scatter(1, rows, True))
    got, drawn_only, whole = (
        exact_head_statistics(call, rows, drawn),
        of_all_rows(own, 0.25),
        of_all_rows(call, 0.25),
    )
    for index, name in enumerate(STATISTICS):
        of_drawn = name in ("entropy", "entropy_normalised")
        assert torch.allclose(got[..., index], (drawn_only if of_drawn else whole)[..., index], atol=2e-5), name
