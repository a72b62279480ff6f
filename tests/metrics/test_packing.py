"""All states of a metric in one vector, whose sum over processes is the metric of all of them."""

from __future__ import annotations

import pytest
import torch

from attn_callbacks.metrics import GroupConfusion, HeadStatisticsMetric
from tests.metrics.merging import assert_equal, reduced
from tests.metrics.test_statistics import COUNT, MAX_LOGIT, random_batch


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_sum_of_packed_states_is_the_union(processes):
    shares, union = [HeadStatisticsMetric(2, 3) for _ in range(processes)], HeadStatisticsMetric(2, 3)
    for k in range(2 * processes):
        values, weight = random_batch(5, 3, seed=k)
        values[..., MAX_LOGIT] -= 7.0  # below zero: what others put in the place of a maximum must not win
        shares[k % processes].update(k % 2, values, weight)
        union.update(k % 2, values, weight)
    before = [metric.highest.clone() for metric in shares]
    total = sum(metric.packed(process, processes) for process, metric in enumerate(shares))
    packed, expected = shares[0].compute_packed(total, processes), union.compute()
    assert (packed.shape, packed.dtype) == ((4, 2, 3, COUNT), torch.float64)
    assert_equal(packed[3], expected.samples.double())
    assert_equal(packed[2], expected.median)
    assert_equal(packed[0, ..., MAX_LOGIT], expected.mean[..., MAX_LOGIT])
    torch.testing.assert_close(packed[0], expected.mean, rtol=1e-14, atol=0, equal_nan=True)
    torch.testing.assert_close(packed[1], expected.standard_error, rtol=1e-9, atol=0, equal_nan=True)
    assert_equal([metric.highest for metric in shares], before)


def test_packing_keeps_minima_maxima_and_types():
    shares = [GroupConfusion(2, 5), GroupConfusion(2, 5)]
    shares[0].update(torch.tensor([0, 1]), torch.tensor([1, 1]), torch.tensor([0, 3]))
    shares[1].update(torch.tensor([1]), torch.tensor([0]), torch.tensor([4]))
    shares[1].lowest.fill_(-3)  # as an accelerator keeps it until `compute`
    total = sum(metric.packed(process, 2) for process, metric in enumerate(shares))
    states, expected = shares[0].unpacked(total, 2), reduced(*shares)
    assert set(states) == {"counts", "lowest", "highest"}
    for name, state in states.items():
        assert_equal(state, getattr(expected, name))
