"""Every statistic of rows, asked of a call and of the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attn_callbacks.capture import AttentionCall, RowStatistic
from tests.capture.exact.cases import noise
from tests.capture.exact.reference import Expected, Reference

TOLERANCE = 2e-5


@dataclass(frozen=True)
class Question:
    ask: Callable[[AttentionCall], RowStatistic]
    expect: Callable[[Reference], Expected]
    compares_positions: bool = False  # refused where queries and keys are not the same tokens
    is_entropy: bool = False  # what a bias that is no sum over queries and keys makes a sample of rows
    unit: Callable[[int], float] = lambda keys: 1.0  # how large the numbers get


def key_features(shape: tuple[int, ...], number: int = 3) -> Tensor:
    return noise(shape[3], number)


def head_features(shape: tuple[int, ...]) -> Tensor:
    return noise(shape[0], shape[1], shape[3], 2)


def _mass(name: str, argument: int, compares_positions: bool = True) -> Question:
    return Question(
        lambda call: getattr(call, name)(argument), lambda ref: getattr(ref, name)(argument), compares_positions
    )


QUESTIONS: dict[str, Question] = {
    "logsumexp": Question(AttentionCall.logsumexp, Reference.logsumexp),
    "max logit": Question(AttentionCall.max_logit, Reference.max_logit),
    "confidence": Question(AttentionCall.confidence, Reference.confidence),
    "expectation": Question(
        lambda call: call.expectation(key_features(call.shape)),
        lambda ref: ref.expectation(key_features(ref.shape)),
    ),
    "expectation of each head": Question(
        lambda call: call.expectation(head_features(call.shape)), lambda ref: ref.expectation(head_features(ref.shape))
    ),
    "expectation of many": Question(
        lambda call: call.expectation(key_features(call.shape, 70)),
        lambda ref: ref.expectation(key_features(ref.shape, 70)),
    ),
    "entropy": Question(AttentionCall.entropy, Reference.entropy, is_entropy=True),
    "entropy of both": Question(
        lambda call: call.entropy_and_expectation(key_features(call.shape))[0], Reference.entropy, is_entropy=True
    ),
    "expectation of both": Question(
        lambda call: call.entropy_and_expectation(key_features(call.shape, 8))[1],
        lambda ref: ref.expectation(key_features(ref.shape, 8)),
        is_entropy=True,
    ),
    "renyi 0.5": Question(lambda call: call.renyi_entropy(0.5), lambda ref: ref.renyi_entropy(0.5), is_entropy=True),
    "renyi 2": Question(AttentionCall.renyi_entropy, lambda ref: ref.renyi_entropy(2.0), is_entropy=True),
    "renyi 3": Question(lambda call: call.renyi_entropy(3.0), lambda ref: ref.renyi_entropy(3.0), is_entropy=True),
    "mean position": Question(AttentionCall.mean_position, Reference.mean_position, unit=float),
    "position variance": Question(AttentionCall.position_variance, Reference.position_variance, unit=lambda n: n**2),
    "mean distance": Question(AttentionCall.mean_distance, Reference.mean_distance, True, unit=float),
    **{f"window {width}": _mass("window_mass", width) for width in (0, 2, 9, 40, 1000)},
    **{f"far {width}": _mass("far_mass", width) for width in (0, 9, 200)},
    "far, of each sample": Question(
        lambda call: call.far_mass(torch.tensor([3, 7, 1])[: call.shape[0]]), lambda ref: ref.far_mass((3, 7, 1)), True
    ),
    **{f"first {k}": _mass("first_mass", k, compares_positions=False) for k in (1, 4, 1000)},
    **{f"offset {offset}": _mass("offset_mass", offset) for offset in (-1, 0, 1, -5, 700)},
}


def at_rows(expected: Expected, got: RowStatistic) -> Expected:
    """What is expected at the rows that were drawn; slots that a short sample leaves over do not count."""
    if got.rows is None:
        return expected
    batch = len(got.rows)
    values = np.stack([expected.values[b][:, got.rows[b].numpy()] for b in range(batch)])
    counted = np.stack([expected.counted[b][:, got.rows[b].numpy()] for b in range(batch)])
    counted &= got.counted.expand(counted.shape).numpy()
    return Expected(values * counted.reshape(counted.shape + (1,) * (values.ndim - 3)), counted)


def error(got: RowStatistic, expected: Expected) -> float:
    """Largest difference, in units of the tolerance of numbers around one; the rows that count must be the same."""
    expected = at_rows(expected, got)
    values = got.values.detach().double().numpy()
    assert values.shape == expected.values.shape or not expected.counted.any()
    assert np.isfinite(values).all()
    counted = got.counted.expand(values.shape[:3]).numpy()
    assert (counted == expected.counted).all(), f"{counted.sum()} rows counted, not {expected.counted.sum()}"
    if not expected.counted.any():
        return float(np.abs(values).max(initial=0.0))
    return float((np.abs(values - expected.values) / np.maximum(1.0, np.abs(expected.values))).max())


def means_agree(got: RowStatistic, expected: Expected, tolerance: float) -> bool:
    """``mean()`` over all rows; NaN where none counts."""
    means = got.mean()
    wanted = expected.mean()
    if not expected.counted.any():
        return bool(means.isnan().all())
    assert means.dtype in (torch.float32, got.values.dtype)
    assert tuple(means.shape) == wanted.shape
    return bool(np.allclose(means.detach().numpy(), wanted, tolerance, tolerance, equal_nan=True))
