"""One pass over the scores answers what single questions answer."""

from __future__ import annotations

import pytest
import torch

from attn_callbacks.capture import AttentionCall
from tests.capture.exact.cases import CASES, attention, made
from tests.capture.exact.questions import error, key_features
from tests.capture.exact.reference import Reference

ROWS = {
    "entropy": Reference.entropy,
    "confidence": Reference.confidence,
    "max_logit": Reference.max_logit,
    "logsumexp": Reference.logsumexp,
    "expectation": lambda reference: reference.expectation(key_features(reference.shape)),
}


@pytest.mark.parametrize("case", CASES)
def test_every_field_is_that_of_the_full_matrix(case: str) -> None:
    call, reference = made(case)
    if call.recorded is not None:
        with pytest.raises(ValueError, match="scores"):
            call.summary()
        return
    summary = call.summary(key_features(call.shape))
    for name, expect in ROWS.items():
        answer = getattr(summary, name)
        expected = expect(reference)
        if answer.is_exact:
            assert error(answer, expected) <= 2e-5, name
    torch.testing.assert_close(summary.received_mass, call.received_mass(), rtol=1e-4, atol=1e-5)


def test_any_bias_is_exact() -> None:
    call = AttentionCall(
        "a", query=torch.randn(1, 2, 90, 8), key=torch.randn(1, 2, 90, 8), mask=torch.randn(1, 2, 90, 90)
    )
    summary = call.summary()
    assert summary.entropy.is_exact
    weights = call.weights()
    torch.testing.assert_close(summary.entropy.values, torch.special.entr(weights).sum(dim=-1), rtol=1e-5, atol=1e-5)
    assert summary.expectation.values.shape == (1, 2, 90, 0)


def test_what_it_found_saves_later_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    call = attention(40, is_causal=True)
    call.summary()
    monkeypatch.setattr("attn_callbacks.capture.exact.problem.attend", None)  # no kernel any more
    expected = attention(40, is_causal=True).weights()[:, :, :, 0]
    torch.testing.assert_close(call.first_mass().values, expected, rtol=1e-5, atol=1e-6)


def test_it_has_no_graph() -> None:
    call = AttentionCall("a", query=torch.randn(1, 2, 9, 8, requires_grad=True), key=torch.randn(1, 2, 9, 8))
    summary = call.summary()
    assert not summary.entropy.values.requires_grad
    assert not summary.received_mass.requires_grad
    assert call.entropy().values.requires_grad
