"""Interaction of heads: the sign on hand-computed games, both ways to measure it, budgets, errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from attn_callbacks.analysis._experiment import HeadExperiment
from attn_callbacks.analysis.ablation import ablate_heads
from attn_callbacks.analysis.interaction import HeadInteractions, head_interactions
from attn_callbacks.capture import gate_heads
from tests.analysis.games import Game, chained, covering, game_loss, ones
from tests.capture.reference import SelfAttention, Stack
from tests.capture.zoo import BY_NAME, INPUTS, build

LAYER = "players.0"
PAIR = ((LAYER, 0), (LAYER, 1))


@pytest.mark.parametrize("pairs", [[PAIR], None], ids=["exact", "estimated"])
@pytest.mark.parametrize(("function", "expected"), [(covering, 0.7), (chained, -1.0)], ids=["redundant", "synergetic"])
def test_games_of_two(function: object, expected: float, pairs: list[tuple[tuple[str, int], ...]] | None) -> None:
    found = head_interactions(Game(), [ones()], game_loss(function), pairs)
    assert found.interaction[0, 1].item() == pytest.approx(expected, abs=1e-6)
    assert found.interaction[1, 0].item() == pytest.approx(expected, abs=1e-6)
    assert found.interaction.diagonal().isnan().all()
    strong, none = found.redundant(), found.synergetic()
    strong, none = (strong, none) if expected > 0 else (none, strong)
    assert [(pair.first, pair.second) for pair in strong] == [PAIR]
    assert strong[0].interaction == pytest.approx(expected, abs=1e-6)
    assert none == ()
    assert found.method == ("estimated" if pairs is None else "exact")
    assert found.samples[0].tolist() == [0, 4]
    assert found.is_complete
    if function is covering:
        assert found.change[0].tolist() == pytest.approx([0.2, 0.1], abs=1e-6)
        assert found.loss == pytest.approx(1.0)


def test_exact_is_what_sets_give_in_ablation() -> None:
    model, data = Stack(SelfAttention(8, 4), SelfAttention(8, 4)), torch.randn(10, 5, 8)
    pair = (("layers.1", 3), ("layers.0", 1))
    found = head_interactions(model, data.split(4), squared, [pair, (("layers.0", 0), ("layers.0", 2))])
    ablated = ablate_heads(model, data.split(4), squared, [*pair, list(pair)])
    expected = ablated.set_change[0] - ablated.change[1, 3] - ablated.change[0, 1]
    first, second = found.heads.index(pair[1]), found.heads.index(pair[0])
    torch.testing.assert_close(found.interaction[first, second], expected, rtol=1e-5, atol=1e-8)
    assert int((~found.interaction.isnan()).sum()) == 4


def squared(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().sum(dim=1)


def test_standard_errors_are_those_of_samples() -> None:
    numbers = torch.randn(7, 1, 2)
    loss = game_loss(lambda outputs: outputs[:, 0, 0] * outputs[:, 0, 1])
    own = numbers.double().prod(dim=-1)[:, 0].numpy()  # off * off - off - off + on: the product
    for pairs in ([PAIR], None):
        found = head_interactions(Game(), numbers.split(3), loss, pairs)
        assert found.interaction[0, 1].item() == pytest.approx(own.mean(), rel=1e-4)
        assert found.standard_error[0, 1].item() == pytest.approx(own.std(ddof=1) / math.sqrt(7), rel=1e-4)


def test_what_the_estimate_leaves_out_is_the_curvature_in_the_second_gate() -> None:
    def curved(outputs: Tensor) -> Tensor:
        return outputs[:, 0, 0] * outputs[:, 0, 1] ** 2

    found = head_interactions(Game(), [ones()], game_loss(curved))
    exact = head_interactions(Game(), [ones()], game_loss(curved), [PAIR])
    assert exact.interaction[0, 1].item() == pytest.approx(1.0)
    # without the first: gate of the second 2 - 0; without the second: gate of the first 1 - 0
    assert found.interaction[0, 1].item() == pytest.approx(1.5)


def by_definition(model: nn.Module, batch: Tensor, sizes: dict[str, int]) -> Tensor:
    """Gradient of a gate on each head (columns) with all on, less that without a head (rows), for each sample."""
    heads = [(name, head) for name, size in sizes.items() for head in range(size)]

    def gradients(off: tuple[str, int] | None) -> Tensor:
        gates = {name: torch.ones(len(batch), size) for name, size in sizes.items()}
        if off is not None:
            gates[off[0]][:, off[1]] = 0.0
        leaves = {name: gate.requires_grad_() for name, gate in gates.items()}
        with gate_heads(model, leaves):
            total = squared(model, batch).sum()
        return torch.cat(torch.autograd.grad(total, list(leaves.values())), dim=1).T

    every = gradients(None)
    return torch.stack([every - gradients(head) for head in heads])


@pytest.mark.parametrize("whole", [False, True], ids=["begun where it differs", "whole runs"])
def test_the_estimate_takes_away_the_head_that_runs_first(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if whole:
        monkeypatch.setattr(HeadExperiment, "can_reuse", lambda *_: False)
    model, data = Stack(SelfAttention(8, 4), SelfAttention(8, 4)), torch.randn(6, 5, 8)
    found = head_interactions(model, data.split(3), squared)
    defined = by_definition(model, data, {"layers.0": 4, "layers.1": 4}).mean(dim=-1).double()
    first, second = found.interaction[:4, :4], found.interaction[:4, 4:]
    torch.testing.assert_close(second, defined[:4, 4:], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found.interaction[4:, :4], second.T)
    other = ~torch.eye(4, dtype=torch.bool)
    own = (defined[:4, :4] + defined[:4, :4].T) / 2
    torch.testing.assert_close(first[other], own[other], rtol=1e-4, atol=1e-7)
    assert not torch.allclose(defined[:4, 4:], defined[4:, :4].T, rtol=1e-2)  # the other order is another number


class Counted(SelfAttention):
    """Counts how often it computes."""

    def __init__(self) -> None:
        super().__init__(8, 4)
        self.runs = 0

    def project(self, tokens: Tensor) -> Tensor:
        self.runs += 1
        return super().project(tokens)


def test_nothing_runs_again_before_the_head_that_is_off() -> None:
    model, data = Stack(Counted(), Counted()), torch.randn(6, 5, 8)
    head_interactions(model, [data], squared)
    first, second = (layer.runs for layer in model.layers)
    assert second - first == 4 + 1  # without each head of the second layer, and the run that makes sure of it


def test_on_a_transformer_the_estimate_goes_with_the_exact_values() -> None:
    model = build(BY_NAME["Bert"], "sdpa")

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(**batch).last_hidden_state.float().flatten(1).tanh().mean(dim=1)

    batch = INPUTS["right"]()
    found = head_interactions(model, [batch], loss)
    pairs = [(found.heads[first], found.heads[second]) for first in range(8) for second in range(first + 1, 8)]
    exact = head_interactions(model, [batch], loss, pairs)
    known = torch.ones(8, 8).triu(diagonal=1).bool()
    both = torch.stack([found.interaction[known], exact.interaction[known]])
    assert float(torch.corrcoef(both)[0, 1]) > 0.8
    torch.testing.assert_close(found.change, exact.change, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found.change_error, exact.change_error, rtol=1e-3, atol=1e-6)


def test_with_means() -> None:
    numbers = torch.tensor([[[1.0, 1.0]], [[3.0, 2.0]], [[2.0, 6.0]]])
    loss = game_loss(lambda outputs: outputs[:, 0, 0] * outputs[:, 0, 1])
    found = head_interactions(Game(), [numbers], loss, [PAIR], value="mean")
    first, second = numbers.double().numpy()[:, 0].T
    own = (first - first.mean()) * (second - second.mean())
    assert found.interaction[0, 1].item() == pytest.approx(own.mean())
    with pytest.raises(ValueError, match="`value='mean'` needs `pairs`"):
        head_interactions(Game(), [numbers], loss, value="mean")


class Clock:
    """Time that goes on by a second with each look at it."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 1.0
        return self.now


@pytest.mark.parametrize("pairs", [[PAIR], None], ids=["exact", "estimated"])
def test_the_time_is_up(pairs: list[tuple[tuple[str, int], ...]] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attn_callbacks.analysis._budget.time", Clock())
    found = head_interactions(Game(), [ones()] * 2, game_loss(covering), pairs, seconds=3.5)
    assert not found.is_complete
    if pairs is None:  # without the first head, but not without the second: one order has to do
        assert found.interaction[0, 1].item() == pytest.approx(0.7, abs=1e-6)
    else:
        assert found.interaction.isnan().all()
        assert found.change[0].isnan().tolist() == [False, False]
    nothing = head_interactions(Game(), [ones()], game_loss(covering), pairs, seconds=0.5)
    assert nothing.interaction.isnan().all()
    assert (nothing.redundant(), nothing.synergetic()) == ((), ())


def test_the_strongest_pairs_come_first() -> None:
    values = torch.tensor([[0.0, 3.0, -1.0], [3.0, 0.0, 5.0], [-1.0, 5.0, 0.0]]).fill_diagonal_(torch.nan)
    heads = (("a", 0), ("a", 1), ("b", 0))
    nothing = torch.full((2, 2), torch.nan)
    found = HeadInteractions(heads, ("a", "b"), values, values.abs(), values, nothing, nothing, 1.0, "exact", True)
    assert [pair[:3] for pair in found.redundant()] == [(heads[1], heads[2], 5.0), (heads[0], heads[1], 3.0)]
    assert [pair[:3] for pair in found.redundant(1)] == [(heads[1], heads[2], 5.0)]
    assert [pair[:3] for pair in found.synergetic()] == [(heads[0], heads[2], -1.0)]
    assert found.to_dict()["interaction"][0][0] is None
    assert found.to_dict()["heads"] == [["a", 0], ["a", 1], ["b", 0]]


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(ValueError, match="pairs of two heads"):
        head_interactions(Game(), [ones()], game_loss(covering), [((LAYER, 0), (LAYER, 0))])
    with pytest.raises(ValueError, match="is no head"):
        head_interactions(Game(), [ones()], game_loss(covering), [((LAYER, 0), ("other", 0))])
    idle = game_loss(lambda outputs: 0 * outputs.sum(dim=(1, 2)))
    for pairs in ([PAIR], None):
        with pytest.raises(RuntimeError, match="with all heads off"):
            head_interactions(Game(), [ones()], idle, pairs)
