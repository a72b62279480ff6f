"""Pruning curves: which head goes first, what the loss is without all of them, and what may be recommended."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attn_callbacks.analysis.ablation import ablate_heads
from attn_callbacks.analysis.pruning import PruningCurve, pruning_curve
from tests.analysis.games import Game, game_loss, ones
from tests.capture.reference import SelfAttention, Stack

LAYER = "players.0"


def doubled(outputs: Tensor) -> Tensor:
    """Heads 0 and 1 stand in for one another, alone worth nothing; head 2 is worth a little, head 3 nothing."""
    first, second, third, _ = outputs[:, 0].unbind(dim=-1)
    return 2.0 - (first + second - first * second) - 0.1 * third


def test_what_stands_in_for_what_is_gone_becomes_important() -> None:
    curve = pruning_curve(Game(), [ones(4, 1, 4)], game_loss(doubled))
    assert curve.removed == (0, 1, 2, 3, 4)
    assert [head for _, head in curve.heads] == [0, 3, 2, 1]  # the second only after all others
    assert curve.change.tolist() == pytest.approx([0.0, 0.0, 0.0, 0.1, 1.1], abs=1e-6)
    assert curve.loss == pytest.approx(0.9)
    assert curve.is_complete
    fine = curve.removable()
    assert [head for _, head in fine.heads] == [0, 3]
    assert fine.change == pytest.approx(0.0, abs=1e-6)
    assert [head for _, head in curve.removable(0.2).heads] == [0, 3, 2]
    assert len(curve.removable(2.0).heads) == 4


def test_scores_are_followed_without_measuring_again() -> None:
    ablated = ablate_heads(Game(), [ones(4, 1, 4)], game_loss(doubled))
    curve = pruning_curve(Game(), [ones(4, 1, 4)], game_loss(lambda x: doubled(x).detach()), ablated.change)
    assert [head for _, head in curve.heads] == [0, 1, 3, 2]  # alone worth nothing, both of them a lot
    assert curve.change.tolist() == pytest.approx([0.0, 0.0, 1.0, 1.0, 1.1], abs=1e-6)


def test_heads_without_a_score_stay() -> None:
    scores = torch.tensor([[0.3, torch.nan, 0.1, 0.2]])
    curve = pruning_curve(Game(), [ones(4, 1, 4)], game_loss(doubled), scores, heads_per_step=2)
    assert [head for _, head in curve.heads] == [2, 3, 0]
    assert curve.removed == (0, 2, 3)
    assert curve.is_complete
    with pytest.raises(ValueError, match=r"shape \(layers, heads\) = \(1, 4\), got \(4,\)"):
        pruning_curve(Game(), [ones(4, 1, 4)], game_loss(doubled), scores[0])


def test_every_point_is_what_ablation_measures() -> None:
    model, data = Stack(SelfAttention(8, 4), SelfAttention(8, 2)), torch.randn(10, 5, 8)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().sum(dim=1)

    curve = pruning_curve(model, data.split(4), loss)
    assert len(set(curve.heads)) == 6
    sets = [list(curve.heads[:count]) for count in curve.removed[2:]]
    ablated = ablate_heads(model, data.split(4), loss, sets)
    torch.testing.assert_close(curve.change[2:], ablated.set_change, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(curve.standard_error[2:], ablated.set_error, rtol=1e-3, atol=1e-6)


def test_the_limit_counts_two_standard_errors() -> None:
    heads = ((LAYER, 0), (LAYER, 1))
    values = torch.tensor([0.0, 0.05, 0.05], dtype=torch.float64)
    curve = PruningCurve((LAYER,), heads, (0, 1, 2), values, torch.tensor([0.0, 0.01, 0.04]).double(), -1.0, True)
    assert curve.removable(0.1) == (heads[:1], 0.05, pytest.approx(0.01))
    assert curve.removable(0.06) == ((), 0.0, 0.0)


def test_the_time_is_up() -> None:
    shares: list[float] = []
    curve = pruning_curve(Game(), [ones(4, 1, 4)], game_loss(doubled), seconds=1e-9, progress=shares.append)
    assert (curve.removed, curve.heads, curve.is_complete) == ((0,), (), False)
    assert shares == [0.0, 0.2]
    assert curve.removable().heads == ()


def test_what_changes_nothing_fails() -> None:
    with pytest.raises(RuntimeError, match="with all heads off"):
        pruning_curve(Game(), [ones()], game_loss(lambda outputs: 0 * outputs.sum(dim=(1, 2))))


def test_as_a_dict() -> None:
    found = pruning_curve(Game(), [ones(4, 1, 4)], game_loss(doubled)).to_dict()
    assert found["removed"] == [0, 1, 2, 3, 4]
    assert found["heads"][0] == [LAYER, 0]
