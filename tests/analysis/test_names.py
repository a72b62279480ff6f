"""How heads and pairs may be told, and what is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attn_callbacks.analysis import (
    ablate_heads,
    cluster_heads,
    head_interactions,
    head_shapley,
)
from tests.analysis.games import Game, covering, game_loss, ones

LAYER = "players.0"
PAIR = ((LAYER, 0), (LAYER, 1))


def test_a_head_may_be_told_in_several_ways() -> None:
    model, batch, loss = Game(2), ones(4, 2), game_loss(lambda outputs: covering(outputs) + covering(outputs[:, 1:]))
    wanted = ablate_heads(model, [batch], loss, heads=[("players.1", 1)])
    for head in (["players.1", 1], ("players.1", np.int64(1)), (1, 1), [1, 1], (np.int32(1), 1)):
        torch.testing.assert_close(ablate_heads(model, [batch], loss, [head]).change, wanted.change, equal_nan=True)
    sets = ablate_heads(model, [batch], loss, [[(0, 0), (0, 1)], (["players.1", 0], (1, 1))]).sets
    assert sets == (PAIR, (("players.1", 0), ("players.1", 1)))
    for head in (("players.1", True), (True, 1), ("players.1", -1), (-1, 0), (2, 0), ("players.1", 1.0), "players.1"):
        with pytest.raises(ValueError, match=r"is no head: give \(layer, head\)"):
            ablate_heads(model, [batch], loss, [head])
    with pytest.raises(ValueError, match=r"`'players.0'` is no head"):
        ablate_heads(model, [batch], loss, (LAYER, 0))


def test_redundant_pairs_of_clusters_are_pairs_of_experiments() -> None:
    places = torch.tensor([0.0, 0.1, 0.5, 1.0])
    clusters = cluster_heads((places[:, None] - places).abs(), layer_names=[LAYER, "players.1"], redundant=0.2)
    (pair,) = clusters.redundant
    loss = game_loss(lambda outputs: covering(outputs) + outputs[:, 1].sum(dim=1))
    found = head_interactions(Game(2), [ones(4, 2)], loss, [(pair.first, pair.second)])
    assert found.redundant(1)[0][:2] == PAIR
    told = clusters.to_dict()["redundant"][0]
    again = head_interactions(Game(2), [ones(4, 2)], loss, [(told["first"], told["second"])])
    assert again.redundant(1) == found.redundant(1)
    assert head_shapley(Game(2), [ones(4, 2)], loss, [pair.first], permutations=2).value[0, 0].isfinite()


def test_pairs_count_once() -> None:
    numbers = torch.randn(7, 1, 2)
    loss = game_loss(lambda outputs: outputs[:, 0, 0] * outputs[:, 0, 1])
    once = head_interactions(Game(), [numbers], loss, [PAIR])
    often = head_interactions(Game(), [numbers], loss, [PAIR, PAIR, PAIR[::-1]])
    assert often.samples[0, 1] == 7
    assert often.standard_error[0, 1] == once.standard_error[0, 1]
    with pytest.raises(ValueError, match="`pairs` holds no pair"):
        head_interactions(Game(), [numbers], loss, [])
