"""Importance added up over examples against a loop, over processes, and without a look at any value."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attn_callbacks.metrics.importance import HeadImportanceMetric
from tests.metrics.merging import reduced
from tests.metrics.test_no_wait import assert_updated_in_place


def batch(seed: int, samples: int = 7, heads: int = 3) -> torch.Tensor:
    return torch.randn(samples, heads, generator=torch.Generator().manual_seed(seed))


def test_mean_and_standard_error_match_a_loop() -> None:
    metric = HeadImportanceMetric(2, 3)
    for seed in range(3):
        metric.update(1, batch(seed))
    values = np.abs(np.concatenate([batch(seed).double().numpy() for seed in range(3)]))
    result = metric.compute()
    np.testing.assert_allclose(result.mean[1], values.mean(axis=0))
    np.testing.assert_allclose(result.standard_error[1], values.std(axis=0, ddof=1) / np.sqrt(21))
    assert result.samples.tolist() == [[0] * 3, [21] * 3]
    assert result.mean[0].isnan().all()
    assert result.standard_error[0].isnan().all()


def test_signs_do_not_cancel() -> None:
    metric = HeadImportanceMetric(1, 1)
    metric.update(0, torch.tensor([[2.0], [-2.0]]))
    assert metric.compute().mean.item() == 2


def test_standard_error_covers_the_true_mean_in_repeated_experiments() -> None:
    values = torch.randn(40, 2000, dtype=torch.float64)  # every head is an experiment of its own
    metric = HeadImportanceMetric(1, 2000)
    metric.update(0, values)
    result = metric.compute()
    inside = (result.mean - (2 / torch.pi) ** 0.5).abs() < 1.96 * result.standard_error
    assert 0.91 < inside.double().mean() < 0.96


def test_two_processes_equal_one_on_the_union() -> None:
    parts, union = (HeadImportanceMetric(1, 3), HeadImportanceMetric(1, 3)), HeadImportanceMetric(1, 3)
    for seed in range(4):
        parts[seed % 2].update(0, batch(seed))
        union.update(0, batch(seed))
    torch.testing.assert_close(tuple(reduced(*parts).compute()), tuple(union.compute()), rtol=1e-14, atol=0)


def test_what_is_not_finite_is_left_out() -> None:
    metric = HeadImportanceMetric(1, 2)
    metric.update(0, torch.tensor([[1.0, torch.nan], [3.0, torch.inf], [torch.inf, -5.0]]))
    result = metric.compute()
    assert result.mean.tolist() == [[2.0, 5.0]]
    assert result.samples.tolist() == [[2, 1]]
    assert result.left_out.tolist() == [[1, 2]]
    assert result.standard_error[0, 0] == 1.0
    assert result.standard_error[0, 1].isnan()


def test_layers_with_fewer_heads_leave_the_rest_undefined() -> None:
    metric = HeadImportanceMetric(1, 4)
    metric.update(0, torch.ones(5, 2))
    assert metric.compute().mean.isnan().tolist() == [[False, False, True, True]]


def test_updates_inside_and_outside_of_inference_mode() -> None:
    metric = HeadImportanceMetric(1, 1)
    with torch.inference_mode():
        metric.update(0, torch.ones(1, 1))
        metric.reset()
    metric.update(0, torch.full((1, 1), 3.0))
    with torch.inference_mode():
        metric.update(0, torch.ones(1, 1))
    assert metric.compute().mean.item() == 2


def test_update_reads_no_value() -> None:
    assert_updated_in_place(HeadImportanceMetric(2, 3).to("meta"), 1, torch.ones(4, 3, device="meta"))


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (2, (4, 3), "`layer` must lie between 0 and 1, got 2"),
        (0, (4, 4), "`gradients` must have at most 3 heads, got 4. Raise `heads`"),
        (0, (4,), "`gradients` must have 2 axes"),
    ],
)
def test_what_does_not_fit_is_refused(layer: int, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeadImportanceMetric(2, 3).update(layer, torch.ones(shape))


@pytest.mark.parametrize("sizes", [(0, 1), (1, 0)])
def test_sizes_below_one_are_refused(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        HeadImportanceMetric(*sizes)
