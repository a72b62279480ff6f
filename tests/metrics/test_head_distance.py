"""Distances added up over samples against a loop, over processes, and without a look at any value."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attn_callbacks.metrics.head_distance import HeadDistance
from tests.metrics.merging import reduced
from tests.metrics.test_no_wait import assert_updated_in_place


def batch(seed: int, samples: int = 5, heads: int = 3) -> torch.Tensor:
    values = torch.rand(samples, heads, heads, generator=torch.Generator().manual_seed(seed))
    return ((values + values.mT) / 2) * (1 - torch.eye(heads))


def test_distance_and_standard_error_match_a_loop() -> None:
    metric = HeadDistance(3)
    for seed in range(3):
        metric.update(batch(seed))
    squares = np.concatenate([batch(seed).double().numpy() for seed in range(3)]) ** 2
    result = metric.compute()
    distance = np.sqrt(squares.mean(axis=0))
    np.testing.assert_allclose(result.distance, distance)
    errors = squares.std(axis=0, ddof=1) / np.sqrt(15) / (2 * np.where(distance == 0, 1, distance))
    np.testing.assert_allclose(result.standard_error, errors)
    assert (result.samples == 15).all()
    assert (result.standard_error.diagonal() == 0).all()


def test_standard_error_covers_the_true_distance_in_repeated_experiments() -> None:
    inside = []
    for seed in range(400):
        metric = HeadDistance(2)
        metric.update(batch(seed, samples=60, heads=2))
        result = metric.compute()
        # a mean of two uniform numbers: variance 1 / 24, mean 1 / 2
        inside.append(abs(result.distance[0, 1] - (1 / 24 + 1 / 4) ** 0.5) < 1.96 * result.standard_error[0, 1])
    assert 0.91 < np.mean(inside) < 0.98


def test_two_processes_equal_one_on_the_union() -> None:
    parts, union = (HeadDistance(3), HeadDistance(3)), HeadDistance(3)
    for seed in range(4):
        parts[seed % 2].update(batch(seed))
        union.update(batch(seed))
    torch.testing.assert_close(tuple(reduced(*parts).compute()), tuple(union.compute()), rtol=1e-13, atol=0)


def test_a_sample_without_a_distance_leaves_that_pair() -> None:
    values = batch(0)
    values[1, 0, 1] = torch.nan
    metric = HeadDistance(3)
    metric.update(values)
    result = metric.compute()
    assert (int(result.samples[0, 1]), int(result.samples[0, 2])) == (4, 5)
    assert result.distance[0, 1].item() == pytest.approx(values[[0, 2, 3, 4], 0, 1].square().mean().sqrt().item())


def test_without_samples_nothing_is_known() -> None:
    result = HeadDistance(2).compute()
    assert result.distance.isnan().all()
    metric = HeadDistance(2)
    metric.update(batch(0, samples=1, heads=2))
    assert metric.compute().standard_error.isnan().all()


def test_update_reads_no_value() -> None:
    assert_updated_in_place(HeadDistance(3).to("meta"), torch.ones(4, 3, 3, device="meta"))


@pytest.mark.parametrize("shape", [(4, 3), (4, 2, 2), (3, 3)])
def test_what_does_not_fit_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="`distances` must have"):
        HeadDistance(3).update(torch.ones(shape))
    with pytest.raises(ValueError, match="must be at least 1"):
        HeadDistance(0)
