"""Bins that are as wide as documented, and medians read from them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attn_callbacks.functional import STATISTICS
from attn_callbacks.metrics.histogram import BINS, bin_index, histogram_median, statistic_edges

WIDTHS = {
    "entropy": lambda x: 0.0157 * np.sqrt(x) + 0.0001,
    "distance": lambda x: 0.028 * (1 + x),
    "max_logit": lambda x: 0.048 * np.sqrt(1 + x**2),
}
RANGES = {"entropy": (0, 16), "distance": (0, 2**20 - 1), "max_logit": (-65536, 65536)}


@pytest.mark.parametrize("name", STATISTICS)
def test_edges_have_the_documented_range_and_width(name):
    edges = statistic_edges((name,))[0].double().numpy()
    assert len(edges) == BINS + 1
    assert (np.diff(edges) > 0).all()
    assert edges[[0, -1]] == pytest.approx(RANGES.get(name, (0, 1)), rel=1e-5)
    nearest = np.minimum(np.abs(edges[1:]), np.abs(edges[:-1]))
    assert (np.diff(edges) <= WIDTHS.get(name, lambda x: 0.0031 + 0 * x)(nearest)).all()


def test_bin_index_puts_every_statistic_on_its_own_scale():
    generator = np.random.default_rng(0)
    edges = statistic_edges()
    values = torch.tensor(generator.uniform(0, 1, (4, 3, len(STATISTICS))), dtype=torch.float32)
    values[0] = edges[:, BINS // 2]  # an edge opens its bin
    index = bin_index(edges, values)
    for cell in np.ndindex(values.shape):
        row = edges[cell[-1]].numpy()
        assert row[index[cell]] <= values[cell] < row[index[cell] + 1]


def test_median_of_an_even_count_is_the_mean_of_the_middle_two():
    counts = torch.tensor([[2, 0, 0, 2]])
    assert histogram_median(counts, torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0]])).item() == pytest.approx(2.0)


def test_median_without_a_value_is_nan():
    assert histogram_median(torch.zeros(2, 3, 4), torch.arange(5.0).repeat(3, 1)).isnan().all()
