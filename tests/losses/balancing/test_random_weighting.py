"""Random weights: the distribution, and draws that depend on the state alone."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from losses.balancing import RandomLossWeighting, random_loss_weights


def test_draws_are_standard_normal_and_unrelated():
    sample = RandomLossWeighting(4, seed=5).scores.double()
    assert sample.mean(dim=0).abs().max() < 0.02
    assert (sample.std(dim=0) - 1).abs().max() < 0.02
    assert (torch.corrcoef(sample.T) - torch.eye(4)).abs().max() < 0.02  # between tasks
    assert abs(np.corrcoef(sample[1:].flatten(), sample[:-1].flatten())[0, 1]) < 0.02  # between steps


def test_weights_are_a_softmax_scaled_to_the_number_of_tasks():
    scores = torch.tensor([0.3, -1.0, 2.0, 0.0])
    expected = 4 * np.exp(scores.numpy()) / np.exp(scores.numpy()).sum()
    np.testing.assert_allclose(random_loss_weights(scores), expected, rtol=1e-5)


def test_draws_begin_anew_when_all_are_used():
    weighting, losses = RandomLossWeighting(2), torch.tensor([1.0, 3.0])
    first = weighting(losses)
    weighting.draws.fill_(2**16)
    torch.testing.assert_close(weighting(losses), first, rtol=0, atol=0)


def test_every_call_draws_anew_and_the_seed_decides():
    losses = torch.eye(3)[0]
    first, again, other = (RandomLossWeighting(3, seed=seed) for seed in (0, 0, 1))
    totals = [[weighting(losses).item() for _ in range(20)] for weighting in (first, again, other)]
    assert totals[0] == totals[1]
    assert not set(totals[0]) & set(totals[2])
    assert len(set(totals[0])) == 20


def test_the_mean_weight_is_one():
    weighting = RandomLossWeighting(3)
    weights = []
    for _ in range(300):
        weighting(torch.ones(3))
        weights.append(weighting.weights())
    mean, deviation = torch.stack(weights).mean(dim=0), torch.stack(weights).std(dim=0)
    assert (mean - 1).abs().max() < 0.15
    assert (deviation > 0.3).all()


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    RandomLossWeighting(3)(torch.ones(3))
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluation_weighs_all_alike_and_draws_nothing():
    weighting = RandomLossWeighting(3)
    weighting(torch.ones(3))
    before = copy.deepcopy(weighting.state_dict())
    assert weighting.eval()(torch.tensor([1.0, 2.0, 4.0])).item() == 7.0
    assert all(torch.equal(value, before[name]) for name, value in weighting.state_dict().items())


def test_a_run_resumes_exactly():
    losses = torch.tensor([1.0, 2.0, 4.0])
    first, second = RandomLossWeighting(3), RandomLossWeighting(3)
    for _ in range(3):
        first(losses)
    torch.manual_seed(99)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.weights(), first.weights())
    for _ in range(3):
        assert second(losses).item() == first(losses).item()


def test_two_calls_before_one_backward():
    weighting, losses = RandomLossWeighting(2), torch.ones(2, requires_grad=True)
    total = weighting(losses)
    first = weighting.weights()
    (total + weighting(losses)).backward()
    torch.testing.assert_close(losses.grad, first + weighting.weights())


def test_checks():
    with pytest.raises(ValueError, match=r"`seed` must be at least 0, got -1"):
        RandomLossWeighting(2, seed=-1)
    assert repr(RandomLossWeighting(2, seed=7)) == "RandomLossWeighting(2, seed=7)"
