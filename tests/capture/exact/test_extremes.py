"""Scores far from zero, rows on one key, keys of equal score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from attn_callbacks.capture import AttentionCall
from tests.capture.exact.cases import LOWEST, additive, attention, noise, padding, triangle
from tests.capture.exact.questions import QUESTIONS, error
from tests.capture.exact.reference import Reference


def scaled(size: float, **options: object) -> AttentionCall:
    """Scores up to ``size`` in absolute value."""
    call = attention(**options)
    scores = Reference(replace(call, scale=1.0, mask=None, is_causal=False)).scores
    scale = size / np.abs(scores).max()
    return replace(call, scale=float(scale))


def level(score: float, **options: object) -> AttentionCall:
    """All scores are about ``score``."""
    query, key = torch.ones(2, 4, 13, 8), torch.full((2, 4, 13, 8), score / 8)
    return AttentionCall("a", query=query, key=key + 0.1 * noise(*key.shape), scale=1.0, **options)


def equal_keys() -> AttentionCall:
    return AttentionCall("a", query=noise(2, 4, 13, 8), key=noise(2, 4, 1, 8).expand(-1, -1, 13, -1), mask=padding())


def groups_of_equal_keys() -> AttentionCall:
    key = 5 * noise(2, 2, 4, 8).repeat_interleave(4, dim=2)[:, :, :13]
    return AttentionCall("a", query=noise(2, 4, 13, 8), key=key, enable_gqa=True, is_causal=True)


def sinks() -> AttentionCall:
    """Every head rests on the first key, as in large language models."""
    call = attention(is_causal=True)
    key = call.key.clone()
    key[:, :, 0] = 0.0
    key[..., 0] = torch.where(torch.arange(13) == 0, 30.0, 0.0)
    return replace(call, query=torch.cat([torch.ones(2, 4, 13, 1), call.query[..., 1:]], dim=-1), key=key, scale=1.0)


EXTREMES: dict[str, Callable[[], AttentionCall]] = {
    "80": lambda: scaled(80.0),
    "80, causal": lambda: scaled(80.0, is_causal=True),
    "80, padding": lambda: scaled(80.0, mask=padding("left")),
    "80, triangle": lambda: scaled(80.0, mask=triangle() & padding("left")),
    "80, grouped heads": lambda: scaled(80.0, key_heads=2, is_causal=True),
    "0.001": lambda: scaled(0.001),
    "scale zero": lambda: attention(scale=0.0),
    "scale zero, causal, padding": lambda: attention(scale=0.0, is_causal=True, mask=padding()),
    "all -60": lambda: level(-60.0),
    "all -60, causal": lambda: level(-60.0, is_causal=True),
    "all -60, padding": lambda: level(-60.0, mask=padding("left")),
    "all -200, padding": lambda: level(-200.0, mask=padding("left")),
    "all -200, lowest": lambda: level(-200.0, mask=additive(triangle() & padding("left"), LOWEST)),
    "all 150": lambda: level(150.0, mask=triangle()),
    "bias of -60": lambda: attention(mask=torch.full((1, 1, 1, 13), -60.0)),
    "bias of -30000": lambda: attention(mask=additive(padding(), -30000.0)),
    "equal keys": equal_keys,
    "groups of equal keys": groups_of_equal_keys,
    "sinks": sinks,
    "zeros": lambda: AttentionCall("a", query=torch.zeros(1, 2, 9, 4), key=torch.zeros(1, 2, 9, 4), is_causal=True),
}


@pytest.mark.parametrize("extreme", EXTREMES)
def test_scores_far_from_zero(extreme: str) -> None:
    call = EXTREMES[extreme]()
    reference = Reference(call)
    highest = reference.scores[reference.counted].max(axis=-1)
    size = max(1.0, np.abs(highest).max() / 10)  # what float32 leaves of such scores
    for name, question in QUESTIONS.items():
        got = question.ask(call)
        assert error(got, question.expect(reference)) <= 2e-5 * size * question.unit(13), name
        assert got.is_exact, name


@pytest.mark.parametrize("extreme", EXTREMES)
def test_mass_received_and_buckets_far_from_zero(extreme: str) -> None:
    call = EXTREMES[extreme]()
    reference = Reference(call)
    assert np.allclose(call.received_mass().numpy(), reference.received_mass(), 5e-4, 5e-4)
    assert np.allclose(call.bucketed_weights(3, 4).numpy(), reference.bucketed_weights(3, 4), atol=2e-4)


@pytest.mark.parametrize("extreme", EXTREMES)
def test_masses_and_entropies_stay_in_their_range(extreme: str) -> None:
    call = EXTREMES[extreme]()
    for name, question in QUESTIONS.items():
        if name.startswith(("window", "first", "offset")):
            values = question.ask(call).values
            assert (values >= 0).all()
            assert (values <= 1 + 1e-4).all()
        elif question.is_entropy and "expectation" not in name:
            assert (question.ask(call).values >= -1e-3).all()
    assert (call.position_variance().values >= -1e-3).all()
    assert (call.received_mass() >= 0).all()
