"""Updates never look at a value: the meta device has none to look at, so a look would raise."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from attn_callbacks.functional import STATISTICS, head_statistics, stratified_rows
from attn_callbacks.metrics import ClassMass, GroupConfusion, HeadStatisticsMetric


def layout(metric: Metric) -> dict[str, tuple[str, torch.dtype, tuple[int, ...]]]:
    """Device, dtype and shape of every state."""
    states: dict[str, Tensor] = {name: getattr(metric, name) for name in metric._defaults}
    return {name: (state.device.type, state.dtype, tuple(state.shape)) for name, state in states.items()}


def assert_updated_in_place(metric: Metric, *batch: int | Tensor) -> None:
    """The update adds to the states where they are: none is replaced, moved or reshaped, and each was written to."""
    states = {name: getattr(metric, name) for name in metric._defaults}
    before, versions = layout(metric), {name: state._version for name, state in states.items()}
    assert {device for device, _, _ in before.values()} == {"meta"}
    metric.update(*batch)
    assert layout(metric) == before
    assert all(getattr(metric, name) is state for name, state in states.items())
    assert [name for name, state in states.items() if state._version == versions[name]] == []
    assert metric.update_called


def test_head_statistics_metric_reads_no_value():
    weights = torch.ones(4, 3, 5, 9, device="meta")
    rows, taken = stratified_rows(torch.ones(4, 9, dtype=torch.bool, device="meta"), 5, torch.Generator())
    keys = torch.ones(4, 9, dtype=torch.bool, device="meta")
    values = head_statistics(weights, weights, positions=rows, allowed=keys[:, None, None], valid=taken, key_valid=keys)
    assert (values.shape, values.device.type) == ((4, 3, len(STATISTICS)), "meta")
    assert_updated_in_place(HeadStatisticsMetric(2, 3).to("meta"), 1, values, keys.sum(dim=1))


def test_counts_by_label_read_no_value_off_the_cpu():
    labels = torch.ones(4, dtype=torch.long, device="meta")
    confusion = GroupConfusion(2, 3).to("meta")
    assert_updated_in_place(confusion, labels, labels, labels)
    assert_updated_in_place(confusion, labels, labels.float(), labels.half())
    assert layout(confusion)["counts"] == ("meta", torch.int64, (3, 2, 2))


def test_masses_by_label_read_no_value_off_the_cpu():
    labels, share = torch.ones(4, dtype=torch.long, device="meta"), torch.ones(4, device="meta")
    mass = ClassMass(2).to("meta")
    assert_updated_in_place(mass, share[:, None], share, labels)
    assert layout(mass)["sums"][2] == (2, 2)
    assert layout(mass)["support"] == ("meta", torch.int64, (2,))
