"""Answers do not depend on how the work is cut up inside, nor on which kernel does it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from attn_callbacks.capture import AttentionCall, rows
from attn_callbacks.capture.exact import kernel, problem, reading
from tests.capture.exact.cases import (
    BOOLEAN,
    CASES,
    SHAPES,
    SLOPES,
    additive,
    attention,
    chance,
    is_square,
    noise,
    padding,
    steps,
    triangle,
    window,
)
from tests.capture.exact.questions import QUESTIONS, TOLERANCE, error
from tests.capture.exact.reference import Reference
from tests.capture.exact.test_extremes import EXTREMES

N = 40  # more rows than the smallest block
LONGER: dict[str, Callable[[], AttentionCall]] = {
    "pairs of 40": lambda: attention(N, mask=chance(1, 1, N, N, share=0.5)),
    "pairs of 40, causal, grouped heads": lambda: attention(
        N, mask=chance(2, 1, N, N, share=0.5), is_causal=True, key_heads=2
    ),
    "heads of 40": lambda: attention(N, mask=chance(2, 4, N, N, share=0.2)),
    "triangle of 40, padding left": lambda: attention(N, mask=triangle(N) & padding("left", N, 17)),
    "window of 40": lambda: attention(N, mask=additive(window(6, N)), key_heads=1),
    "window of 40, causal": lambda: attention(N, mask=(window(6, N) | window(6, N).mT), is_causal=True),
    "bias of 40": lambda: attention(N, mask=noise(1, 4, N, N), is_causal=True),
    "ALiBi of 40": lambda: attention(N, mask=additive(triangle(N)) - (SLOPES * steps(N).abs())[None]),
    "flex of 20": lambda: attention(20, heads=1, mask_mod=lambda b, h, q, k: (q - k).abs() < 7 + 9 * b),
    "fewer keys of 40": lambda: attention(N, 25, mask=chance(1, 1, N, 25, share=0.5), is_causal=True),
    "more keys of 40": lambda: attention(25, N, mask=chance(1, 1, 25, N, share=0.5), is_causal=True),
}
CUT = [name for name in CASES if not name.startswith(("long", "T5, long", "flex", "scores", "recorded"))]


def check(name: str, size: float = 1.0) -> None:
    call = {**CASES, **EXTREMES, **LONGER}[name]()
    reference = Reference(call)
    for asked, question in QUESTIONS.items():
        if is_square(call) or not question.compares_positions:
            tolerance = TOLERANCE * size * question.unit(call.shape[-1])
            assert error(question.ask(call), question.expect(reference)) <= tolerance, asked
    assert np.allclose(call.received_mass().numpy(), reference.received_mass(), 1e-4 * size, 1e-5 * size)
    assert np.allclose(call.bucketed_weights(1, 1).numpy(), reference.bucketed_weights(1, 1), atol=TOLERANCE * size)


@pytest.mark.parametrize("name", [*SHAPES, "bfloat16", "cross, fewer keys, padding", "key mask of each head", *LONGER])
def test_few_heads_and_few_rows_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problem, "_PART_BYTES", 2000)
    monkeypatch.setattr(problem, "_SLICE", 4)
    monkeypatch.setattr(rows, "_BLOCK_BYTES", 64)
    check(name)


@pytest.mark.parametrize("name", [name for name in CUT if name in BOOLEAN])
def test_masks_in_a_simpler_form(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks that say no more than causal and padding; small ones are else not looked at."""
    monkeypatch.setattr(reading, "_LARGE", 0)
    monkeypatch.setattr(rows, "_BLOCK_BYTES", 64)
    check(name)


@pytest.fixture
def _no_private_operators(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def missing(*_: object) -> tuple[torch.Tensor, torch.Tensor]:
        raise AttributeError("no such operator")

    monkeypatch.setattr(kernel, "_cpu_flash", missing)
    kernel._kernel.cache_clear()
    yield
    kernel._kernel.cache_clear()


@pytest.mark.filterwarnings("ignore:The fused kernel")
@pytest.mark.usefixtures("_no_private_operators")
@pytest.mark.parametrize("name", [*CUT, *EXTREMES])
def test_without_the_private_operators(name: str) -> None:
    check(name, size=20.0 if name in EXTREMES else 1.0)


@pytest.mark.usefixtures("_no_private_operators")
def test_a_slower_way_is_announced() -> None:
    call = CASES["causal"]()
    with pytest.warns(UserWarning, match="cannot be used on cpu: no such operator"):
        call.entropy()
