"""Updates never look at a value: the meta device has none to look at."""

from __future__ import annotations

import torch

from attn_callbacks.functional import STATISTICS, head_statistics, stratified_rows
from attn_callbacks.metrics import ClassMass, GroupConfusion, HeadStatisticsMetric


def test_head_statistics_metric_reads_no_value():
    metric = HeadStatisticsMetric(2, 3).to("meta")
    weights = torch.ones(4, 3, 5, 9, device="meta")
    rows, taken = stratified_rows(torch.ones(4, 9, dtype=torch.bool, device="meta"), 5, torch.Generator())
    keys = torch.ones(4, 9, dtype=torch.bool, device="meta")
    values = head_statistics(weights, weights, positions=rows, allowed=keys[:, None, None], valid=taken, key_valid=keys)
    assert values.shape == (4, 3, len(STATISTICS))
    metric.update(1, values, keys.sum(dim=1))


def test_counts_by_label_read_no_value_off_the_cpu():
    labels = torch.ones(4, dtype=torch.long, device="meta")
    GroupConfusion(2, 2).to("meta").update(labels, labels, labels)
    share = torch.ones(4, device="meta")
    ClassMass(2).to("meta").update(share[:, None], share, labels)
