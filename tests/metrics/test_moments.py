"""Mean and standard error from sums."""

from __future__ import annotations

import numpy as np
import torch

from attn_callbacks.metrics.moments import mean_and_error


def test_mean_and_error_match_numpy_and_know_what_is_too_few():
    values = np.random.default_rng(0).normal(2.0, 0.5, size=(3, 50))
    taken = np.array([[50], [2], [1]])
    values[np.arange(50) >= taken] = 0.0
    count = torch.tensor([50, 2, 1, 0])
    first, second = (torch.tensor([*sums, 0.0]) for sums in (values.sum(axis=1), (values**2).sum(axis=1)))
    mean, error = mean_and_error(count, first, second)
    np.testing.assert_allclose(mean, [values[0].mean(), values[1, :2].mean(), values[2, 0], np.nan])
    expected = [values[0].std(ddof=1) / np.sqrt(50), values[1, :2].std(ddof=1) / np.sqrt(2), np.nan, np.nan]
    np.testing.assert_allclose(error, expected)


def test_equal_values_have_an_error_of_about_zero():
    _, error = mean_and_error(torch.tensor(7), torch.tensor(0.1).double() * 7, torch.tensor(0.1).double() ** 2 * 7)
    assert 0 <= error < 1e-8
