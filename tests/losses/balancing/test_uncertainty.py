"""Uncertainty weighting against the paper's two forms, its optimum, and losses that reach zero."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from losses.balancing import UncertaintyWeighting, uncertainty_weighted_loss


def reference(losses, sigmas, kinds):
    """The paper in terms of sigma: equation 7 for regressions, equation 10 with classifications."""
    total = 0.0
    for loss, sigma, classification in zip(losses, sigmas, kinds, strict=True):
        total += loss / (sigma**2 if classification else 2 * sigma**2) + math.log(sigma)
    return total


@pytest.mark.parametrize("kinds", [[False, False, False], [True, False, True]])
def test_against_the_paper(kinds):
    losses, sigmas = [0.3, 2.0, 11.0], [0.5, 1.0, 3.0]
    log_variance = torch.tensor(sigmas, dtype=torch.float64).square().log()
    given = uncertainty_weighted_loss(torch.tensor(losses, dtype=torch.float64), log_variance, kinds)
    assert given.item() == pytest.approx(reference(losses, sigmas, kinds), rel=1e-12)


def test_one_kind_serves_all_tasks():
    losses, log_variance = torch.rand(3), torch.randn(3)
    given = uncertainty_weighted_loss(losses, log_variance, True)
    torch.testing.assert_close(given, uncertainty_weighted_loss(losses, log_variance, [True] * 3))
    torch.testing.assert_close(given, uncertainty_weighted_loss(losses, log_variance))  # that of classifiers
    assert UncertaintyWeighting(2).weights().tolist() == [1.0, 1.0]
    assert UncertaintyWeighting(2, classification=False).weights().tolist() == [0.5, 0.5]


def test_gradcheck():
    losses = torch.rand(3, dtype=torch.float64, requires_grad=True)
    log_variance = torch.randn(3, dtype=torch.float64, requires_grad=True)
    function = lambda loss, spread: uncertainty_weighted_loss(loss, spread, [True, False, False])  # noqa: E731
    assert torch.autograd.gradcheck(function, (losses, log_variance))


def test_the_best_log_variance_makes_weights_the_inverse_of_the_losses():
    weighting, losses = UncertaintyWeighting(3, classification=[True, False, False]), torch.tensor([0.2, 1.0, 30.0])
    optimizer = torch.optim.Adam(weighting.parameters(), lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        weighting(losses).backward()
        optimizer.step()
    factors = np.array([1.0, 0.5, 0.5])
    expected = np.log(2 * factors * losses.numpy())
    np.testing.assert_allclose(weighting.log_variance.detach(), expected, atol=1e-2)
    np.testing.assert_allclose(weighting.weights(), 0.5 / losses.numpy(), rtol=1e-2)


def test_weights_are_the_derivative_of_the_total():
    weighting = UncertaintyWeighting(3, classification=[False, True, False])
    torch.nn.init.normal_(weighting.log_variance)
    losses = torch.rand(3, requires_grad=True)
    weighting(losses).backward()
    torch.testing.assert_close(losses.grad, weighting.weights())


@pytest.mark.parametrize("start", [-500.0, -21.0])
def test_a_loss_that_stayed_at_zero_is_finite_and_finds_back(start):
    weighting = UncertaintyWeighting(1)
    torch.nn.init.constant_(weighting.log_variance, start)
    total = weighting(torch.zeros(1))
    total.backward()
    assert total.isfinite()
    assert weighting.log_variance.grad.item() == pytest.approx(0.5)
    weighting.log_variance.grad = None
    weighting(torch.ones(1)).backward()
    assert -torch.inf < weighting.log_variance.grad.item() < 0  # descent raises the variance again
    assert weighting.weights().isfinite().all()


def test_there_is_one_parameter_to_keep_from_weight_decay():
    weighting = UncertaintyWeighting(2)
    assert [name for name, _ in weighting.named_parameters()] == ["log_variance"]
    assert list(weighting.state_dict()) == ["log_variance"]
    torch.nn.init.constant_(weighting.log_variance, 3.0)
    groups = [{"params": torch.nn.Linear(1, 1).parameters()}, {"params": weighting.parameters(), "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    weighting.log_variance.grad = torch.zeros(2)
    optimizer.step()
    assert weighting.log_variance.tolist() == [3.0, 3.0]


def test_a_bfloat16_module_accumulates_in_float32():
    weighting = UncertaintyWeighting(2).bfloat16()
    total = weighting(torch.tensor([1.0, 3.0], dtype=torch.bfloat16))
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(4.0)


def test_checks():
    with pytest.raises(ValueError, match=r"`classification` must be one value or 2, got \[True\]"):
        UncertaintyWeighting(2, classification=[True])
    with pytest.raises(ValueError, match=r"`log_variance` must have shape \(tasks,\) = \(2,\), got \(2, 1\)"):
        uncertainty_weighted_loss(torch.ones(2), torch.zeros(2, 1))
    assert repr(UncertaintyWeighting(1)) == "UncertaintyWeighting(1, classification=[True])"
