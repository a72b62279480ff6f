"""What all weightings take: a vector or scalars, in any floating dtype."""

from __future__ import annotations

import pytest
import torch

from losses.balancing import DynamicWeightAverage, LossBalancer, RandomLossWeighting, UncertaintyWeighting
from losses.balancing._base import loss_vector

WEIGHTINGS = [UncertaintyWeighting, DynamicWeightAverage, RandomLossWeighting]


@pytest.mark.parametrize("build", WEIGHTINGS)
def test_a_vector_and_scalars_give_the_same(build):
    losses = torch.tensor([0.5, 2.0, 4.0])
    torch.testing.assert_close(build(3)(losses), build(3)(list(losses)), rtol=0, atol=0)


@pytest.mark.parametrize("build", WEIGHTINGS)
@pytest.mark.parametrize(
    ("losses", "error", "message"),
    [
        (torch.ones(3), ValueError, r"`losses` must have shape \(tasks,\) = \(2,\), got \(3,\)"),
        ([torch.ones(())], ValueError, r"`losses` must hold 2 losses, one for each task, got 1"),
        ([torch.ones(()), torch.ones(1)], ValueError, r"`losses\[1\]` must be a scalar, got shape \(1,\). Reduce it"),
        ([torch.ones(()), 0.5], TypeError, r"`losses\[1\]` must be a scalar tensor, got float"),
    ],
)
def test_call_checks(build, losses, error, message):
    with pytest.raises(error, match=message):
        build(2)(losses)


@pytest.mark.parametrize("build", WEIGHTINGS)
def test_num_tasks_is_checked(build):
    with pytest.raises(ValueError, match=r"`num_tasks` must be at least 1, got 0"):
        build(0)


def test_half_precision_is_added_up_in_float32():
    large = torch.tensor(60000.0, dtype=torch.float16)
    total = LossBalancer(["a", "b"], fixed={"c": 1.0})({"a": large, "b": large, "c": large})
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(3 * 60000, rel=1e-3)
    assert loss_vector([large, torch.tensor(1.0, dtype=torch.float64)], 2).dtype == torch.float64


@pytest.mark.parametrize("build", WEIGHTINGS)
def test_weights_are_copies(build):
    weighting = build(2)
    weighting.weights().fill_(7.0)
    assert (weighting.weights() < 2).all()
