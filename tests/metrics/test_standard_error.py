"""The clustered standard error against repeated experiments."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attn_callbacks.functional import STATISTICS
from attn_callbacks.metrics import HeadStatisticsMetric

COUNT = len(STATISTICS)


def test_standard_error_is_that_of_repeated_experiments():
    """Rows of a sample share an offset, and samples differ in length: the error must cover both."""
    generator = np.random.default_rng(0)
    samples, repeats = 60, 2000
    length = generator.integers(4, 40, (samples, repeats))
    shared = generator.normal(0.0, 0.1, (samples, repeats))
    noise = generator.normal(0.0, 0.3, (samples, repeats)) / np.sqrt(length)
    values = torch.tensor(0.5 + shared + noise)
    # Every repeat is a head of its own, so that one metric runs all experiments; each has its own lengths.
    metric = HeadStatisticsMetric(repeats, 1)
    for k in range(repeats):
        metric.update(k, values[:, k, None, None].expand(-1, 1, COUNT), torch.tensor(length[:, k]))
    result = metric.compute()
    mean, error = result.mean[:, 0, 0].numpy(), result.standard_error[:, 0, 0].numpy()
    assert error.mean() == pytest.approx(mean.std(ddof=1), rel=0.05)
    coverage = (np.abs(mean - 0.5) < 1.96 * error).mean()
    assert 0.92 < coverage < 0.96
    naive = np.sqrt((0.1**2 + 0.3**2) / length.sum(axis=0))  # rows taken as independent
    assert (np.abs(mean - 0.5) < 1.96 * naive).mean() < 0.85
