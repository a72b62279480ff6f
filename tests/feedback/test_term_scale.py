"""The running averages behind a scale-free strength: by hand, over processes, what is left out."""

from __future__ import annotations

import math

import pytest
import torch

from attn_callbacks.feedback import term_scale as module
from attn_callbacks.feedback.term_scale import averaged, scale


def steps(*values):
    averages = None
    for base, term, annotated in values:
        averages = averaged(averages, torch.tensor(base), torch.tensor(term), torch.tensor(annotated))
    return averages


def test_running_averages_by_hand():
    first = steps((2.0, 0.5, True))
    assert first.tolist() == [2.0, 0.5]
    assert steps((2.0, 0.5, True), (1.0, 0.7, True)).tolist() == pytest.approx([1.99, 0.502])


def test_what_is_not_known_leaves_the_averages_alone():
    assert steps((2.0, 0.5, True), (1.0, 0.0, False)).tolist() == pytest.approx([1.99, 0.5])
    assert steps((2.0, 0.5, True), (math.nan, math.inf, True)).tolist() == [2.0, 0.5]
    late = steps((2.0, 0.0, False))
    assert late[0] == 2
    assert math.isnan(late[1])
    assert steps((2.0, 0.0, False), (2.0, 0.3, True)).tolist() == pytest.approx([2.0, 0.3])


def test_averages_carry_no_graph_and_are_single():
    base = torch.tensor(2.0, dtype=torch.bfloat16, requires_grad=True)
    averages = averaged(None, base * 1, base * 2, torch.tensor(True))
    assert (averages.dtype, averages.requires_grad) == (torch.float32, False)


def test_processes_share_their_averages(monkeypatch):
    """One has annotated samples, the other has none."""
    other = torch.tensor([[4.0, 0.0], [1.0, 0.0]])
    monkeypatch.setattr(module.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(module.distributed, "all_reduce", lambda sums: sums.add_(other))
    assert steps((2.0, 0.5, True)).tolist() == [3.0, 0.5]


def test_scale_gives_the_term_the_size_of_the_loss_within_bounds():
    assert float(scale(torch.tensor([2.0, 0.5]))) == 4.0
    assert float(scale(torch.tensor([2.0, 0.0]))) == 100.0
    assert float(scale(torch.tensor([0.0, 0.5]))) == pytest.approx(0.01)
    assert float(scale(torch.tensor([2.0, math.nan]))) == 1.0
