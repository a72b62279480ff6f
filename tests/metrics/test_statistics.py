"""Means, clustered standard errors and medians of heads against plain numpy."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from attn_callbacks.functional import STATISTICS, head_statistics
from attn_callbacks.metrics import HeadStatisticsMetric
from tests.metrics.merging import assert_equal, reduced

COUNT = len(STATISTICS)
MAX_LOGIT = STATISTICS.index("max_logit")
ENTROPY = STATISTICS.index("entropy")


def random_batch(batch: int, heads: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values in [0, 1] with gaps, and weights of which one is zero."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(batch, heads, COUNT, generator=generator)
    values[torch.rand(values.shape, generator=generator) < 0.2] = torch.nan
    weight = torch.randint(1, 30, (batch,), generator=generator)
    weight[-1] = 0
    return values, weight


def loop_result(values: np.ndarray, weight: np.ndarray):
    """Mean, standard error, median and samples of one cell; ``values`` and ``weight`` hold one number a sample."""
    pairs = [(float(m), float(w)) for m, w in zip(values, weight, strict=True) if w > 0 and not np.isnan(m)]
    if not pairs:
        return np.nan, np.nan, np.nan, 0
    total = sum(w for _, w in pairs)
    mean = sum(w * m for m, w in pairs) / total
    count = len(pairs)
    error = np.nan
    if count > 1:
        error = (count / (count - 1) * sum((w * (m - mean)) ** 2 for m, w in pairs)) ** 0.5 / total
    return mean, error, float(np.median([m for m, _ in pairs])), count


def test_metric_matches_loops_over_samples():
    metric = HeadStatisticsMetric(layers=3, heads=2)
    batches = {layer: [random_batch(6, 2, seed=10 * layer + k) for k in range(3)] for layer in (0, 2)}
    for layer, items in batches.items():
        for values, weight in items:
            metric.update(layer, values, weight)
    result = metric.compute()
    assert all(field.shape == (3, 2, COUNT) for field in result)
    for layer, items in batches.items():
        values = torch.cat([values for values, _ in items]).double().numpy()
        weight = torch.cat([weight for _, weight in items]).numpy()
        for head in range(2):
            for k in range(COUNT - 1):
                mean, error, median, samples = loop_result(values[:, head, k], weight)
                cell = (layer, head, k)
                assert result.samples[cell] == samples
                assert result.mean[cell].item() == pytest.approx(mean, rel=1e-12)
                assert result.standard_error[cell].item() == pytest.approx(error, rel=1e-9)
                assert result.median[cell].item() == pytest.approx(median, abs=0.05)
            finite = values[:, head, MAX_LOGIT][weight > 0]
            assert result.mean[layer, head, MAX_LOGIT].item() == np.nanmax(finite)
            assert result.standard_error[layer, head, MAX_LOGIT].isnan()
    assert result.mean[1].isnan().all()
    assert (result.samples[1] == 0).all()


@pytest.mark.parametrize("name", ["entropy", "self_mass", "distance", "max_logit"])
@pytest.mark.parametrize("samples", [1, 2, 9, 500])
def test_median_matches_numpy_within_a_bin(name, samples):
    generator = np.random.default_rng(samples)
    draw = {
        "entropy": lambda: generator.gamma(2.0, 1.0, samples),
        "self_mass": lambda: generator.beta(0.3, 2.0, samples),
        "distance": lambda: generator.gamma(1.0, 40.0, samples),
        "max_logit": lambda: generator.normal(0.0, 30.0, samples),
    }
    width = {  # of a bin around x, as documented in `statistic_edges`
        "entropy": lambda x: 0.0157 * x**0.5 + 0.0001,
        "self_mass": lambda x: 0.0031,
        "distance": lambda x: 0.028 * (1 + x),
        "max_logit": lambda x: 0.048 * (1 + x**2) ** 0.5,
    }
    values = torch.zeros(samples, 1, COUNT)
    values[:, 0, STATISTICS.index(name)] = torch.tensor(draw[name]())
    metric = HeadStatisticsMetric(1, 1)
    metric.update(0, values, torch.ones(samples))
    column = values[:, 0, STATISTICS.index(name)].numpy()
    ordered = np.sort(np.abs(column - np.median(column)))
    largest = np.abs(np.median(column)) + ordered[min(1, samples - 1)]  # the farther of the two in the middle
    error = abs(metric.compute().median[0, 0, STATISTICS.index(name)].item() - np.median(column))
    assert error <= width[name](largest)


def test_median_outside_the_range_stays_at_its_ends():
    values = torch.zeros(3, 1, COUNT)
    values[:, 0, STATISTICS.index("distance")] = 1e9
    values[:, 0, MAX_LOGIT] = -torch.inf
    metric = HeadStatisticsMetric(1, 1)
    metric.update(0, values, torch.ones(3))
    median = metric.compute().median[0, 0]
    assert median[STATISTICS.index("distance")].item() == pytest.approx(2**20, rel=0.03)
    assert median[MAX_LOGIT].item() == pytest.approx(-65536, rel=0.05)


def test_two_processes_equal_one_on_the_union():
    batches = [random_batch(5, 2, seed) for seed in range(4)]
    halves = [HeadStatisticsMetric(2, 2), HeadStatisticsMetric(2, 2)]
    union = HeadStatisticsMetric(2, 2)
    for k, (values, weight) in enumerate(batches):
        halves[k % 2].update(k // 2, values, weight)
        union.update(k // 2, values, weight)
    result, expected = reduced(*halves).compute(), union.compute()
    assert_equal(result.samples, expected.samples)
    assert_equal(result.median, expected.median)
    torch.testing.assert_close(result.mean, expected.mean, rtol=1e-14, atol=0, equal_nan=True)
    torch.testing.assert_close(result.standard_error, expected.standard_error, rtol=1e-9, atol=0, equal_nan=True)


def test_merge_state_equals_the_union():
    first, second, union = (HeadStatisticsMetric(1, 2) for _ in range(3))
    for metric, seed in ((first, 0), (second, 1)):
        metric.update(0, *random_batch(5, 2, seed))
        union.update(0, *random_batch(5, 2, seed))
    first.merge_state(second)
    torch.testing.assert_close(first.compute().mean, union.compute().mean, rtol=1e-14, atol=0, equal_nan=True)
    assert_equal(first.compute().median, union.compute().median)


def test_pooled_mean_of_all_rows_weighs_samples_by_length():
    metric = HeadStatisticsMetric(1, 1)
    weights = torch.zeros(2, 1, 4, 4)
    weights[0, 0, :2, :2] = 0.5
    weights[1, 0] = torch.eye(4)
    valid = torch.tensor([[True, True, False, False], [True] * 4])
    metric.update(0, head_statistics(weights, allowed=valid[:, None, None], valid=valid), valid.sum(dim=1))
    assert metric.compute().mean[0, 0, ENTROPY].item() == pytest.approx(2 * np.log(2) / 6)


def test_layers_with_fewer_heads_leave_the_missing_ones_nan():
    metric = HeadStatisticsMetric(layers=2, heads=3)
    metric.update(0, torch.full((4, 3, COUNT), 0.5), torch.ones(4))
    metric.update(1, torch.full((4, 1, COUNT), 0.5), torch.ones(4))
    result = metric.compute()
    assert (result.mean[0] == 0.5).all()
    assert (result.mean[1, 0] == 0.5).all()
    assert result.mean[1, 1:].isnan().all()
    assert result.median[1, 1:].isnan().all()


def test_one_sample_has_no_standard_error():
    metric = HeadStatisticsMetric(1, 1)
    metric.update(0, torch.full((1, 1, COUNT), 0.5), torch.ones(1))
    result = metric.compute()
    assert result.standard_error.isnan().all()
    assert (result.mean == 0.5).all()


def test_missing_statistic_leaves_only_its_own_cell():
    values = torch.full((2, 1, COUNT), 0.25)
    values[0, 0, ENTROPY] = torch.nan
    metric = HeadStatisticsMetric(1, 1)
    metric.update(0, values, torch.tensor([3, 5]))
    result = metric.compute()
    assert result.samples[0, 0].tolist() == [1] + [2] * (COUNT - 1)
    assert (result.mean == 0.25).all()


def test_empty_batch_changes_nothing():
    metric = HeadStatisticsMetric(1, 1)
    metric.update(0, torch.full((2, 1, COUNT), 0.5), torch.ones(2))
    metric.update(0, torch.zeros(0, 1, COUNT), torch.ones(0))
    assert (metric.compute().samples == 2).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_added_in_float64(dtype):
    values = torch.full((3, 1, COUNT), 0.3).to(dtype)
    metric = HeadStatisticsMetric(1, 1)
    for _ in range(100):
        metric.update(0, values, torch.ones(3, dtype=dtype))
    assert metric.compute().mean[0, 0, 0].item() == pytest.approx(values[0, 0, 0].item(), rel=1e-12)


def test_updates_cross_the_border_of_inference_mode():
    metric = HeadStatisticsMetric(1, 1)
    batch = (torch.full((2, 1, COUNT), 0.5), torch.ones(2))
    with torch.inference_mode():
        metric.update(0, *batch)
        metric.compute()
    metric.update(0, *batch)
    assert (metric.compute().samples == 4).all()
    with torch.inference_mode():
        metric.reset()
        metric.update(0, *batch)
        inside = HeadStatisticsMetric(1, 1)
        metric.sync(dist_sync_fn=lambda state, group: [state], distributed_available=lambda: True)
        metric.unsync()  # the states are inference tensors now
    assert metric.moments.is_inference()
    metric.update(0, *batch)
    inside.update(0, *batch)
    assert (metric.compute().samples == 4).all()
    assert (inside.compute().samples == 2).all()


def test_reset_forgets_everything():
    metric = HeadStatisticsMetric(1, 1)
    metric.update(0, torch.full((2, 1, COUNT), 0.5), torch.ones(2))
    metric.reset()
    metric.update(0, torch.full((2, 1, COUNT), 0.25), torch.ones(2))
    result = metric.compute()
    assert (result.mean == 0.25).all()
    assert (result.samples == 2).all()


def test_metric_is_picklable_and_holds_no_state_dict():
    metric = HeadStatisticsMetric(1, 1)
    metric.update(0, torch.full((2, 1, COUNT), 0.5), torch.ones(2))
    assert_equal(tuple(pickle.loads(pickle.dumps(metric)).compute()), tuple(metric.compute()))
    assert metric.state_dict() == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": 2}, "`layer` must lie between 0 and 1, got 2"),
        ({"layer": -1}, "`layer` must lie between 0 and 1, got -1"),
        ({"statistics": torch.ones(3, COUNT)}, "`statistics` must have 3 axes"),
        ({"statistics": torch.ones(3, 4, COUNT)}, "`statistics` must have at most 2 heads, got 4"),
        ({"statistics": torch.ones(3, 2, 4)}, "`statistics` must hold the 10 of `STATISTICS`, got 4"),
        ({"weight": torch.ones(2)}, r"`weight` must have shape \(batch,\) = \(3,\), got \(2,\)"),
    ],
)
def test_wrong_update_raises(arguments, message):
    metric = HeadStatisticsMetric(layers=2, heads=2)
    with pytest.raises(ValueError, match=message):
        metric.update(**{"layer": 0, "statistics": torch.ones(3, 2, COUNT), "weight": torch.ones(3), **arguments})


@pytest.mark.parametrize("name", ["layers", "heads"])
def test_wrong_size_raises(name):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
        HeadStatisticsMetric(**{"layers": 1, "heads": 1, name: 0})
