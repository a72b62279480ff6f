"""OutcomeStatistics against a plain loop over samples; the sum of processes; what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attn_callbacks.metrics.outcome_statistics import OutcomeStatistics

LAYERS, HEADS, STATISTICS, CLASSES = 2, 3, 4, 3


def data(samples: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    values = torch.randn(samples, LAYERS, HEADS, STATISTICS, generator=source)
    values[torch.rand(values.shape, generator=source) < 0.1] = torch.nan
    target = torch.randint(-1, CLASSES, (samples,), generator=source)
    return values, target, torch.rand(samples, generator=source) < 0.6


def filled(seeds: tuple[int, ...]) -> OutcomeStatistics:
    metric = OutcomeStatistics(LAYERS, HEADS, STATISTICS, CLASSES)
    for seed in seeds:
        values, target, right = data(17, seed)
        for layer in range(LAYERS):
            metric.update(layer, values[:, layer], target, right)
    return metric


def test_against_a_loop() -> None:
    found = filled((0, 1)).compute()
    groups: dict[tuple[int, ...], list[float]] = {}
    for seed in (0, 1):
        values, target, right = data(17, seed)
        for sample in range(17):
            if target[sample] < 0:
                continue
            for cell in np.ndindex(LAYERS, HEADS, STATISTICS):
                value = float(values[(sample, *cell)])
                if not np.isnan(value):
                    groups.setdefault((*cell, int(target[sample]), int(right[sample])), []).append(value)
    for cell in np.ndindex(LAYERS, HEADS, STATISTICS, CLASSES, 2):
        own = groups.get(cell, [])
        assert int(found.moments.samples[cell]) == len(own)
        assert float(found.mean[cell]) == pytest.approx(np.mean(own) if own else np.nan, nan_ok=True)
        error = np.std(own, ddof=1) / len(own) ** 0.5 if len(own) > 1 else np.nan
        assert float(found.error[cell]) == pytest.approx(error, nan_ok=True)


def test_processes_together_are_one() -> None:
    together, parts = filled((0, 1, 2)), [filled((0, 2)), filled((1,))]
    total = sum(part.packed(rank, 2) for rank, part in enumerate(parts))
    found, expected = parts[0].merged(total, 2).compute(), together.compute()
    torch.testing.assert_close(found.mean, expected.mean, equal_nan=True)
    assert torch.equal(found.moments.samples, expected.moments.samples)


def test_fewer_heads_and_empty_batches() -> None:
    metric = OutcomeStatistics(1, HEADS, 1, 2)
    metric.update(0, torch.ones(2, 1, 1), torch.tensor([0, 1]), torch.tensor([True, False]))
    metric.update(0, torch.ones(0, 1, 1), torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.bool))
    assert metric.compute().moments.samples[0, :, 0].flatten(1).tolist() == [[0, 1, 1, 0], [0] * 4, [0] * 4]


@pytest.mark.parametrize(
    ("layer", "shape", "target", "right", "message"),
    [
        (2, (1, HEADS, STATISTICS), [0], [True], "`layer` must lie between 0 and 1, got 2"),
        (0, (1, HEADS + 1, STATISTICS), [0], [True], "at most 3 heads and 4 statistics"),
        (0, (1, HEADS, STATISTICS), [0], [True, False], "`right` must have shape"),
        (0, (1, HEADS, STATISTICS), [CLASSES], [True], "`target` must lie between 0 and 2, got 3"),
    ],
)
def test_refusals(layer: int, shape: tuple[int, ...], target: list[int], right: list[bool], message: str) -> None:
    metric = OutcomeStatistics(LAYERS, HEADS, STATISTICS, CLASSES)
    with pytest.raises(ValueError, match=message):
        metric.update(layer, torch.zeros(shape), torch.tensor(target), torch.tensor(right))
