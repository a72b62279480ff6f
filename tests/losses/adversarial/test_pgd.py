"""Projected gradient descent against a loop in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from losses.adversarial import PGD, pgd_perturbation

WEIGHT = torch.randn(5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def logistic(inputs):
    return torch.nn.functional.softplus(inputs @ WEIGHT - inputs.square().sum(dim=1)).mean()


def by_hand(sample, norm, epsilon, step_size, steps, start, bounds, allowed):
    """One sample, one step at a time, with the gradient of `logistic` written out."""
    weight, moved = WEIGHT.numpy(), start.copy()
    for _ in range(steps):
        point = sample + moved
        slope = 1 / (1 + np.exp(-(point @ weight - point @ point)))
        gradient = np.where(allowed, slope * (weight - 2 * point), 0)
        if norm == "linf":
            moved = np.minimum(np.maximum(moved + step_size * np.sign(gradient), -epsilon), epsilon)
        else:
            length = np.sqrt((gradient**2).sum())
            moved = moved + (step_size * gradient / length if length > 0 else 0)
            if np.sqrt((moved**2).sum()) > epsilon:
                moved = moved * epsilon / np.sqrt((moved**2).sum())
        if bounds is not None:
            moved = np.minimum(np.maximum(sample + moved, bounds[0]), bounds[1]) - sample
    return moved


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("bounds", [None, (0, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_against_a_loop(norm, bounds, masked):
    inputs = torch.rand(6, 5, dtype=torch.float64)
    mask = torch.rand(6, 5) < 0.6 if masked else torch.ones(6, 5, dtype=torch.bool)
    settings = {"epsilon": 0.3, "step_size": 0.11, "steps": 5}
    found = pgd_perturbation(logistic, inputs, norm=norm, bounds=bounds, mask=mask, **settings)
    for sample, allowed, moved in zip(inputs.numpy(), mask.numpy(), found.numpy(), strict=True):
        expected = by_hand(sample, norm, start=np.zeros(5), bounds=bounds, allowed=allowed, **settings)
        np.testing.assert_allclose(moved, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_against_a_loop_from_a_random_start(norm):
    inputs, seen = torch.rand(6, 5, dtype=torch.float64), []

    def spied(x):
        seen.append(x.detach().clone())
        return logistic(x)

    settings = {"epsilon": 0.3, "step_size": 0.05, "steps": 3}
    found = pgd_perturbation(spied, inputs, norm=norm, random_start=True, bounds=(0, 1), **settings)
    for index in range(6):
        expected = by_hand(
            inputs[index].numpy(),
            norm,
            start=(seen[0] - inputs)[index].numpy(),
            bounds=(0, 1),
            allowed=np.ones(5, bool),
            **settings,
        )
        np.testing.assert_allclose(found[index].numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("norm", "size"), [("l2", lambda x: x.norm(dim=1)), ("linf", lambda x: x.abs().amax(dim=1))])
def test_the_random_start_fills_the_ball(norm, size):
    inputs, seen = torch.zeros(4000, 3), []
    mask = torch.tensor([True, True, False]).expand(4000, 3)

    def spied(x):
        seen.append(x.detach().clone())
        return (x * 0).sum()

    pgd_perturbation(spied, inputs, epsilon=2.0, norm=norm, random_start=True, steps=1, mask=mask)
    sizes = size(seen[0])
    assert sizes.max() <= 2.0
    assert seen[0][:, 2].eq(0).all()
    inner = (sizes < 1.0).float().mean()  # half the radius: a quarter of a disc, of a square
    torch.testing.assert_close(inner, torch.tensor(0.25), rtol=0, atol=0.03)
    torch.testing.assert_close(seen[0].mean(dim=0), torch.zeros(3), rtol=0, atol=0.06)


def test_it_stays_within_the_ball_and_the_bounds():
    inputs = torch.rand(20, 3, 4, 4)
    inputs[0], inputs[1] = 0.0, 1.0
    weight = torch.randn(3, 4, 4)
    settings = {"epsilon": 8 / 255, "step_size": 2 / 255, "steps": 10, "norm": "linf", "bounds": (0, 1)}
    found = pgd_perturbation(lambda x: (x * weight).sum(), inputs, random_start=True, **settings)
    assert found.abs().max() <= 8 / 255 + 1e-7
    assert (inputs + found).min() >= 0
    assert (inputs + found).max() <= 1
    reached = torch.where(weight > 0, (1 - inputs).clamp(max=8 / 255), -inputs.clamp(max=8 / 255))
    torch.testing.assert_close(found, reached, rtol=0, atol=1e-6)


def test_bounds_leave_what_is_masked_exactly_alone():
    inputs = torch.rand(4, 3, 5, 5)
    mask = torch.rand(4, 5, 5) < 0.5
    found = pgd_perturbation(lambda x: x.sin().sum(), inputs, epsilon=0.5, bounds=(0, 1), mask=mask)
    assert found.transpose(0, 1)[:, ~mask].eq(0).all()
    assert found.ne(0).any()


def test_inputs_outside_the_bounds_are_refused():
    with pytest.raises(ValueError, match=r"`inputs` must lie between 0 and 1, got 1.5"):
        PGD(bounds=(0, 1))(lambda x: x.sum(), torch.tensor([[0.0, 1.5]]))


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("steps", [1, 4])
def test_the_loss_of_a_linear_model_rises(norm, steps):
    model, inputs, target = torch.nn.Linear(5, 3), torch.randn(8, 5), torch.randint(3, (8,))

    def each(x):
        return torch.nn.functional.cross_entropy(model(x), target, reduction="none")

    attack = PGD(0.2, 0.1, steps, norm)
    moved = inputs + pgd_perturbation(
        lambda x: each(x).mean(), inputs, epsilon=0.2, step_size=0.1, steps=steps, norm=norm
    )
    assert (each(moved) > each(inputs)).all()
    torch.testing.assert_close(attack(lambda x: each(x).mean(), inputs), each(moved).mean())


def test_a_radius_of_zero_is_the_clean_loss():
    inputs = torch.randn(4, 5, dtype=torch.float64)
    for norm in ("l2", "linf"):
        attack = PGD(epsilon=0, norm=norm, random_start=True)
        torch.testing.assert_close(attack(logistic, inputs), logistic(inputs), rtol=0, atol=0)
