"""Shapley values: the axioms on toy games, against all permutations, truncation, budgets."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor

from attn_callbacks.analysis.shapley import head_shapley
from tests.analysis.games import Game, chained, covering, game_loss, ones

LAYER = "players.0"


def worth(outputs: Tensor) -> Tensor:
    """Heads 0 and 1 play the same part, head 2 none, head 3 needs head 0 or 1."""
    first, second, _, fourth = outputs[:, 0].unbind(dim=-1)
    either = first + second - first * second
    return 3.0 - 2.0 * either - 1.0 * either * fourth


def exact(function: object, players: int) -> np.ndarray:
    """Every order, head by head."""

    def loss(on: set[int]) -> float:
        numbers = torch.tensor([[[float(head in on) for head in range(players)]]])
        return float(function(numbers))

    gains = np.zeros(players)
    orders = list(permutations(range(players)))
    for order in orders:
        for place, head in enumerate(order):
            before = set(order[:place])
            gains[head] += loss(before) - loss(before | {head})
    return gains / len(orders)


def test_a_game_of_four() -> None:
    found = head_shapley(Game(), [ones(1, 1, 4)], game_loss(worth), permutations=200, truncation=0)
    expected = exact(worth, 4)
    assert expected == pytest.approx([7 / 6, 7 / 6, 0.0, 2 / 3])
    deviation = np.abs(found.value[0].numpy() - expected)
    assert (deviation <= 3 * found.standard_error[0].numpy() + 1e-9).all()
    assert found.standard_error[0, 0].item() == pytest.approx(0.08, abs=0.02)
    assert found.value[0, 2].item() == pytest.approx(0.0, abs=1e-9)  # dummy
    assert abs(float(found.value[0, 0] - found.value[0, 1])) < 0.4  # symmetry
    assert (found.permutations, found.truncated, found.is_complete) == (200, 0.0, True)


@pytest.mark.parametrize("permutations", [1, 5])
def test_efficiency_holds_for_every_permutation(permutations: int) -> None:
    numbers = torch.randn(6, 2, 3)
    loss = game_loss(lambda outputs: outputs.sum(dim=(1, 2)).sin())
    found = head_shapley(Game(2), numbers.split(4), loss, permutations=permutations, truncation=0)
    assert found.all_on == pytest.approx(float(numbers.sum(dim=(1, 2)).sin().mean()), abs=1e-6)
    assert found.all_off == pytest.approx(0.0, abs=1e-6)
    assert float(found.value.sum()) == pytest.approx(found.all_off - found.all_on, abs=1e-9)
    assert found.gap == pytest.approx(0.0, abs=1e-9)
    assert found.standard_error.isnan().all() == (permutations == 1)


def test_heads_that_stand_in_for_one_another_share() -> None:
    found = head_shapley(Game(), [ones()], game_loss(covering), permutations=64, truncation=0)
    assert found.value[0].tolist() == pytest.approx([(0.9 + 0.2) / 2, (0.8 + 0.1) / 2], abs=0.1)
    chain = head_shapley(Game(), [ones()], game_loss(chained), permutations=64, truncation=0)
    assert chain.value[0].tolist() == pytest.approx([0.5, 0.5], abs=0.15)


def test_truncation_saves_runs_and_says_what_it_left_over() -> None:
    def first_counts(outputs: Tensor) -> Tensor:
        return 10.0 - 9.99 * outputs[:, 0, 0] - 0.01 * outputs[:, 0, 1:].mean(dim=-1)

    shares: list[float] = []
    found = head_shapley(
        Game(), [ones(1, 1, 12)], game_loss(first_counts), permutations=8, truncation=0.01, progress=shares.append
    )
    assert 0.1 < found.truncated < 0.9
    assert 0 < abs(found.gap) < 0.01 * 10
    assert found.value[0, 0].item() == pytest.approx(9.99, abs=1e-3)
    assert shares[-1] == 1.0
    whole = head_shapley(Game(), [ones(1, 1, 12)], game_loss(first_counts), permutations=8, truncation=0)
    assert abs(whole.gap) < 1e-5


def test_others_stay_on() -> None:
    found = head_shapley(Game(), [ones()], game_loss(covering), [(LAYER, 1)], permutations=3)
    assert found.value[0, 0].isnan()
    assert found.value[0, 1].item() == pytest.approx(0.1)
    assert (found.all_on, found.all_off) == (pytest.approx(1.0), pytest.approx(1.1))


def test_the_seed_is_its_own() -> None:
    state = torch.get_rng_state()
    first, same, other = (
        head_shapley(Game(), [ones(1, 1, 4)], game_loss(worth), permutations=3, seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(first.value, same.value)
    assert not torch.equal(first.value, other.value)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_time_is_up() -> None:
    found = head_shapley(Game(), [ones()], game_loss(covering), seconds=1e-9)
    assert found.value.isnan().all()
    assert (found.permutations, found.is_complete) == (0, False)


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(ValueError, match="`heads` must hold some heads, each once"):
        head_shapley(Game(), [ones()], game_loss(covering), [(LAYER, 0), (LAYER, 0)])
    with pytest.raises(ValueError, match="`truncation` must lie between 0"):
        head_shapley(Game(), [ones()], game_loss(covering), truncation=2)
    with pytest.raises(RuntimeError, match="with all heads off"):
        head_shapley(Game(), [ones()], game_loss(lambda outputs: 0 * outputs.sum(dim=(1, 2))))


def test_as_a_dict() -> None:
    found = head_shapley(Game(), [ones()], game_loss(covering), permutations=2).to_dict()
    assert found["layer_names"] == [LAYER]
    assert all(isinstance(value, (bool, int, float, list)) for value in found.values())
