"""A model that has diverged shows: NaN is not taken for sharp attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from attn_callbacks.capture import AttentionCall, exact_head_statistics
from attn_callbacks.capture.exact import head_statistics as module
from attn_callbacks.functional import STATISTICS
from tests.capture.exact.cases import attention, padding
from tests.capture.exact.questions import QUESTIONS, Question

BROKEN: dict[str, Callable[[], AttentionCall]] = {
    "plain": attention,
    "causal": lambda: attention(is_causal=True),
    "padding": lambda: attention(mask=padding()),
    "pairs": lambda: attention(mask=torch.ones(1, 1, 13, 13, dtype=torch.bool).tril(2)),
}


def broken(call: AttentionCall) -> AttentionCall:
    """The queries of head 1 are NaN."""
    query = call.query.clone()
    query[:, 1] = torch.nan
    return replace(call, query=query)


@pytest.mark.parametrize("name", QUESTIONS)
@pytest.mark.parametrize("kind", BROKEN)
def test_rows_of_nan_answer_nan(kind: str, name: str) -> None:
    question: Question = QUESTIONS[name]
    if name.startswith(("offset 700", "window 1000")) or name in ("far 200", "first 1000"):
        return  # nothing, or everything, whatever the scores
    answer = question.ask(broken(BROKEN[kind]()))
    own = answer.values[:, 1][answer.counted[:, 1]]
    nothing = own == 0.0  # rows at the ends of the sequence have nothing far away
    assert (own.isnan() | (nothing if name.startswith("far") else torch.zeros_like(nothing))).all()
    assert own.isnan().any() or len(own) == 0
    assert answer.values[:, [0, 2, 3]].isfinite().all()


def test_head_statistics_are_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SMALL_BYTES", -1)
    call = broken(attention())
    values = exact_head_statistics(call, None, call.query_valid)
    assert values[:, 1].isnan().all()
    assert values[:, [0, 2, 3]].isfinite().all(), STATISTICS
