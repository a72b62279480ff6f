"""Reduce the states of several metrics the way torchmetrics does across processes."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torchmetrics import Metric

AnyMetric = TypeVar("AnyMetric", bound=Metric)


def reduced(*metrics: AnyMetric) -> AnyMetric:
    """Return what every process holds while it computes: a copy that gathers from all of ``metrics``."""
    result = copy.deepcopy(metrics[0])
    gathered = {name: [getattr(metric, name) for metric in metrics] for name in result._reductions}
    calls = iter(gathered.values())
    result.sync(dist_sync_fn=lambda _, group: next(calls), distributed_available=lambda: True)
    result._to_sync, result._computed = False, None
    return result


def assert_equal(left: object, right: object) -> None:
    """Compare tensors, or tuples of tensors, bit by bit; NaN equals NaN."""
    torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)
