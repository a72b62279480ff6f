"""Statistics of the softmax of logits, against loops in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attn_callbacks.functional import STATISTICS, head_statistics
from attn_callbacks.functional._frame import Frame
from attn_callbacks.functional.statistics import logit_statistics
from tests.functional.reference import as_tensors, named, random_case, reference_statistics


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padding", ["", "left", "right"])
def test_logit_statistics_match_loops(padding, causal):
    case = random_case(padding, causal)
    _, logits, positions, allowed, valid, key_valid = as_tensors(*case)
    frame = Frame(positions=positions, allowed=allowed, valid=valid, key_valid=key_valid)
    given = logits.where(allowed, -torch.inf)
    result = logit_statistics(given, frame)
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result.numpy(), reference_statistics(*case), atol=2e-6)
    assert torch.equal(given, logits.where(allowed, -torch.inf))


@pytest.mark.parametrize("shift", [-3e4, -200.0, 200.0])
def test_logit_statistics_of_large_logits_are_rounded_as_these_are(shift):
    logits = (3 * torch.randn(2, 2, 8, 64)).div(2**-6).round().mul(2**-6)  # exact after the shift, too
    rows = Frame(positions=torch.arange(8))
    expected, found = (logit_statistics(logits + each, rows)[..., :-1] for each in (0.0, shift))
    torch.testing.assert_close(found, expected, atol=2e-7 * abs(shift), rtol=1e-5)


def test_logit_statistics_of_certain_rows_are_exact():
    logits = torch.full((1, 1, 2, 5), -torch.inf)
    logits[..., 2] = 7.3
    found = named(logit_statistics(logits, Frame(square=False)))
    assert (found["entropy"], found["confidence"]) == (0.0, 1.0)


@pytest.mark.parametrize("shape", [(0, 2, 3, 3), (2, 1, 0, 3)])
def test_statistics_of_nothing_are_nan(shape):
    positions = torch.zeros(shape[2], dtype=torch.long)
    for found in (
        logit_statistics(torch.ones(shape), Frame(positions=positions)),
        head_statistics(torch.ones(shape), positions=positions),
    ):
        assert found.shape == (*shape[:2], len(STATISTICS))
        assert found.isnan().all()
