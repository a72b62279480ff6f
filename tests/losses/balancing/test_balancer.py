"""The balancer: each weight once, names checked, penalties apart, weights for a log, state with the strategy."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from losses.balancing import (
    DynamicWeightAverage,
    GradNorm,
    LossBalancer,
    RandomLossWeighting,
    UncertaintyWeighting,
)

STRATEGIES = {
    "equal": lambda: None,
    "uncertainty": lambda: UncertaintyWeighting(2),
    "dynamic": lambda: DynamicWeightAverage(2),
    "gradnorm": lambda: GradNorm(2, lr=0.3),
    "random": lambda: RandomLossWeighting(2),
}


def call(balancer, leaves):
    arguments = {"shared": list(leaves.values())} if isinstance(balancer.strategy, GradNorm) else {}
    return balancer({name: leaf * 1.0 for name, leaf in leaves.items()}, **arguments)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_weight_is_applied_once(strategy):
    """Weights were applied in the loss and again where losses are added, so that ``w * w * L`` was minimised."""
    balancer = LossBalancer(["a", "b"], STRATEGIES[strategy](), fixed={"penalty": 0.25})
    if strategy == "uncertainty":
        nn.init.constant_(balancer.strategy.log_variance, 1.0)
    for values in ([1.0, 8.0], [0.5, 7.0], [0.4, 1.0]):
        leaves = {
            name: torch.tensor(value, requires_grad=True)
            for name, value in zip(("a", "b", "penalty"), [*values, 2.0], strict=True)
        }
        call(balancer, leaves).backward()
        weights = balancer.weights()
        assert list(weights) == ["a", "b", "penalty"]
        for name, leaf in leaves.items():
            torch.testing.assert_close(leaf.grad, weights[name])
        balancer.step()
    if strategy != "equal":
        assert weights["a"].item() != 1.0


def test_without_a_strategy_losses_are_added_up():
    losses = {name: torch.rand(()) for name in ("a", "b", "c")}
    torch.testing.assert_close(LossBalancer(["a", "b", "c"])(losses), sum(losses.values()))


def test_fixed_terms_never_reach_the_strategy():
    strategy = DynamicWeightAverage(2)
    balancer = LossBalancer(["a", "b"], strategy, fixed={"penalty": 3.0})
    balancer({"a": torch.tensor(1.0), "penalty": torch.tensor(100.0), "b": torch.tensor(2.0)})
    assert strategy.loss_sum.tolist() == [1.0, 2.0]


def test_the_order_of_the_mapping_does_not_matter():
    losses = {"a": torch.tensor(1.0), "b": torch.tensor(5.0)}
    totals = []
    for names in (("a", "b"), ("b", "a")):
        balancer = LossBalancer(["a", "b"], RandomLossWeighting(2, seed=4))
        totals.append(balancer({name: losses[name] for name in names}).item())
    assert totals[0] == totals[1]


def test_the_callers_mapping_is_left_alone():
    losses = {"a": torch.tensor(1.0), "penalty": torch.tensor(2.0)}
    before = dict(losses)
    fixed = {"penalty": 0.5}
    LossBalancer(["a"], fixed=fixed)(losses)
    assert losses == before
    assert fixed == {"penalty": 0.5}


def test_weights_do_not_change_afterwards():
    balancer = LossBalancer(["a", "b"], RandomLossWeighting(2))
    losses = {"a": torch.tensor(1.0), "b": torch.tensor(1.0)}
    balancer(losses)
    weights = balancer.weights()
    kept = copy.deepcopy(weights)
    balancer(losses)
    assert weights == kept
    assert balancer.weights() != kept


def test_the_state_dict_carries_the_strategy():
    first, second = (LossBalancer(["a", "b"], DynamicWeightAverage(2)) for _ in range(2))
    for values in ([1.0, 1.0], [0.2, 0.9]):
        first({"a": torch.tensor(values[0]), "b": torch.tensor(values[1])})
        first.step()
    second.load_state_dict(first.state_dict())
    assert second.weights() == first.weights()
    assert second.weights()["b"] > 1


def test_a_strategy_of_ones_own():
    class Halving(nn.Module):
        def forward(self, losses):
            return sum(losses) / 2

        def weights(self):
            return torch.full((2,), 0.5)

        def step(self):
            pass

    balancer = LossBalancer(["a", "b"], Halving())
    assert balancer({"a": torch.tensor(1.0), "b": torch.tensor(3.0)}).item() == 2.0
    assert balancer.weights()["a"].item() == 0.5


@pytest.mark.parametrize(
    ("losses", "error", "message"),
    [
        ({"a": torch.ones(())}, ValueError, r"must name exactly \['a', 'b', 'p'\]: missing \['b', 'p'\], unknown \[\]"),
        (
            dict.fromkeys(("a", "b", "p", "q"), torch.ones(())),
            ValueError,
            r"must name exactly \['a', 'b', 'p'\]: missing \[\], unknown \['q'\]",
        ),
        (
            {**dict.fromkeys(("a", "b"), torch.ones(())), "p": torch.ones(2)},
            ValueError,
            r"`losses\['p'\]` must be a sca",
        ),
        (
            {**dict.fromkeys(("a", "b"), torch.ones(())), "p": 1.0},
            TypeError,
            r"`losses\['p'\]` must be a scalar tensor",
        ),
        ([torch.ones(())] * 3, TypeError, r"`losses` must be a mapping of names to scalars, got list"),
    ],
)
def test_call_checks(losses, error, message):
    with pytest.raises(error, match=message):
        LossBalancer(["a", "b"], fixed={"p": 1.0})(losses)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tasks": "label"}, TypeError, r"`tasks` must be a sequence of names, got one string: pass \['label'\]"),
        ({"tasks": []}, ValueError, r"`num_tasks` must be at least 1, got 0"),
        ({"tasks": ["a", "a"]}, ValueError, r"Names in `tasks` and `fixed` must differ, got \['a'\] more than once"),
        ({"tasks": ["a"], "fixed": {"a": 1.0}}, ValueError, r"must differ, got \['a'\] more than once"),
        ({"tasks": ["a"], "fixed": {"p": -1.0}}, ValueError, r"`fixed\['p'\]` must be a finite number, at least 0"),
        ({"tasks": ["a"], "fixed": {"p": float("nan")}}, ValueError, r"`fixed\['p'\]` must be a finite number"),
        ({"tasks": ["a"], "strategy": GradNorm(2)}, ValueError, r"`strategy` weighs 2 losses, but `tasks` names 1"),
        (
            {"tasks": ["a"], "strategy": nn.Identity()},
            TypeError,
            r"must have a method `weights\(\)`, Identity has none",
        ),
    ],
)
def test_construction_checks(arguments, error, message):
    with pytest.raises(error, match=message):
        LossBalancer(**arguments)


def test_repr_shows_how_to_build_it():
    balancer = LossBalancer(["a", "b"], RandomLossWeighting(2, seed=3), fixed={"p": 0.5})
    assert "['a', 'b'], fixed={'p': 0.5}" in repr(balancer)
    assert "(strategy): RandomLossWeighting(2, seed=3)" in repr(balancer)
