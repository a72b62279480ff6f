"""GradNorm against its objective, where it settles, what it leaves alone, and a run that is cut anywhere."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from losses.balancing import GradNorm, LossBalancer, gradnorm_weights


def reference(weight, norms, progress, alpha, lr):
    """Descend by a numerical derivative, one weight at a time."""
    mean = (weight * norms).mean()
    target = mean * (progress / progress.mean()) ** alpha  # a constant of the objective, as the paper says
    slope = np.zeros_like(weight)
    for k in range(len(weight)):
        ends = []
        for sign in (1, -1):
            moved = np.log(weight).copy()
            moved[k] += sign * 1e-6
            ends.append(np.abs(np.exp(moved) * norms - target).sum() / mean)
        slope[k] = (ends[0] - ends[1]) / 2e-6
    moved = np.exp(np.log(weight) - lr * slope)
    return len(moved) * moved / moved.sum()


@pytest.mark.parametrize("alpha", [0.0, 0.12, 1.5])
@pytest.mark.parametrize("seed", range(3))
def test_one_step_against_the_derivative_of_the_objective(alpha, seed):
    draw = np.random.default_rng(seed)
    weight, norms, progress = draw.uniform(0.2, 3.0, (3, 4))
    given = gradnorm_weights(*map(torch.tensor, (weight, norms, progress)), alpha=alpha, lr=0.1)
    np.testing.assert_allclose(given, reference(weight, norms, progress, alpha, 0.1), rtol=1e-6)
    assert given.sum().item() == pytest.approx(4.0)


@pytest.mark.parametrize("norms", [[1.0, 2.0], [1.0, 10.0, 1000.0], [1e-6, 2e-6], [1e6, 1e2]])
def test_norms_become_equal_whatever_their_scale(norms):
    norms, weight = torch.tensor(norms), torch.ones(len(norms))
    for _ in range(1000):
        weight = gradnorm_weights(weight, norms, torch.ones(len(norms)), alpha=1.5)
    pull = weight * norms
    assert (pull / pull.mean() - 1).abs().max() < 0.1
    assert weight.sum().item() == pytest.approx(len(norms), rel=1e-5)


def test_a_slow_task_pulls_more():
    weight, norms, progress = torch.ones(2), torch.ones(2), torch.tensor([0.5, 1.0])
    for _ in range(500):
        weight = gradnorm_weights(weight, norms, progress, alpha=1.0)
    np.testing.assert_allclose(weight, [2 / 3, 4 / 3], rtol=0.05)


@pytest.mark.parametrize("norms", [[0.0, 0.0], [0.0, 1.0]])
@pytest.mark.parametrize("progress", [[0.0, 0.0], [-1.0, 1.0], [1.0, 1.0]])
def test_zeros_and_negative_losses_stay_finite_and_positive(norms, progress):
    weight = torch.ones(2)
    for _ in range(300):
        weight = gradnorm_weights(weight, torch.tensor(norms), torch.tensor(progress), lr=1.0)
    assert weight.isfinite().all()
    assert (weight > 0).all()


class Model(nn.Module):
    """Two heads on one layer; the second loss is a hundred times the first."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.shared, self.heads = nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 1), nn.Linear(4, 1)])

    def losses(self, data):
        features = self.shared(data).tanh()
        return [(scale * head(features)).square().mean() for scale, head in zip((1, 10), self.heads, strict=True)]


def data(step):
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(step))


def shared_norms(model, losses):
    gradients = [torch.autograd.grad(loss, list(model.shared.parameters()), retain_graph=True) for loss in losses]
    return [float(sum(float(part.square().sum()) for part in parts) ** 0.5) for parts in gradients]


def test_a_call_in_training_against_the_function():
    model, weighting, weight, initial = Model(), GradNorm(2, lr=0.1), np.ones(2), None
    for step in range(4):
        losses = model.losses(data(step))
        values, norms = np.array([loss.item() for loss in losses]), np.array(shared_norms(model, losses))
        initial = values if initial is None else initial
        assert weighting(losses, model.shared.parameters()).item() == pytest.approx(float(weight @ values), rel=1e-5)
        np.testing.assert_allclose(weighting.weights(), weight, rtol=1e-5)
        weight = reference(weight, norms, values / initial, 1.5, 0.1)
        np.testing.assert_allclose(weighting.next_weight, weight, rtol=1e-4)
    np.testing.assert_allclose(weighting.initial_loss, initial, rtol=1e-6)


def test_one_ordinary_backward_follows_with_the_weights_applied_once():
    model, weighting = Model(), GradNorm(2)
    weighting.next_weight.copy_(torch.tensor([1.75, 0.25]))
    losses = model.losses(data(0))
    expected = torch.autograd.grad(1.75 * losses[0] + 0.25 * losses[1], list(model.parameters()), retain_graph=True)
    total = weighting(losses, model.shared.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    total.backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_two_calls_before_one_backward():
    model, weighting = Model(), GradNorm(2)
    total = weighting(model.losses(data(0)), model.shared.weight)
    (total + weighting(model.losses(data(1)), model.shared.weight)).backward()
    assert model.shared.weight.grad.isfinite().all()


def test_a_vector_and_an_activation_do_as_well():
    model, first, second = Model(), GradNorm(2), GradNorm(2)
    losses = model.losses(data(0))
    first(losses, model.shared.parameters())
    second(torch.stack(losses), list(model.shared.parameters()))
    torch.testing.assert_close(first.next_weight, second.next_weight)
    features = torch.randn(3, 2, requires_grad=True).tanh()
    weighting = GradNorm(2)
    weighting([features.square().sum(), 2 * features.square().sum()], features).backward()
    assert weighting.next_weight[0] > 1 > weighting.next_weight[1]


def test_balanced_training_makes_both_tasks_pull():
    model, weighting = Model(), GradNorm(2, alpha=0.0)
    for step in range(200):
        weighting(model.losses(data(step)), model.shared.parameters())
    pull = weighting.next_weight * torch.tensor(
        shared_norms(model, model.losses(torch.cat([data(i) for i in range(50)])))
    )
    assert 0.7 < (pull[0] / pull[1]).item() < 1.4


@pytest.mark.parametrize("quiet", ["eval", "no_grad"])
def test_outside_training_nothing_moves(quiet):
    model, weighting = Model(), GradNorm(2)
    weighting(model.losses(data(0)), model.shared.parameters())
    before = copy.deepcopy(weighting.state_dict())
    with torch.set_grad_enabled(quiet != "no_grad"):
        weighting.train(quiet != "eval")
        losses = model.losses(data(1))
        total = weighting(losses, model.shared.parameters())
    torch.testing.assert_close(total, (before["next_weight"] * torch.stack(losses)).sum())
    assert all(torch.equal(value, before[name]) for name, value in weighting.state_dict().items())


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_step_that_overflowed_moves_nothing(bad):
    model, weighting = Model(), GradNorm(2)
    before = copy.deepcopy(weighting.state_dict())
    first, second = model.losses(data(0))
    weighting([first, second * bad], model.shared.parameters())
    assert all(torch.equal(value, before[name]) for name, value in weighting.state_dict().items())
    weighting([first, second], model.shared.parameters())
    assert (weighting.initial_loss > 0).all()


def test_a_given_initial_loss_is_kept():
    model, weighting = Model(), GradNorm(2, initial_loss=[0.5, 2.0])
    weighting(model.losses(data(0)), model.shared.parameters())
    assert weighting.initial_loss.tolist() == [0.5, 2.0]
    assert repr(weighting) == "GradNorm(2, alpha=1.5, lr=0.025, initial_loss=[0.5, 2.0])"


def train(model, balancer, optimizer, start, stop):
    totals = []
    for step in range(start, stop):
        optimizer.zero_grad()
        losses = dict(zip(("a", "b"), model.losses(data(step)), strict=True))
        total = balancer(losses, shared=model.shared.parameters())
        total.backward()
        optimizer.step()
        totals.append(total.item())
    return totals


def test_a_run_resumes_exactly():
    """No optimizer is hidden beside the state dict, as FAMO of torchjd 0.18 hides one."""

    def parts():
        model = Model()
        return model, LossBalancer(["a", "b"], GradNorm(2, lr=0.1)), torch.optim.Adam(model.parameters(), lr=0.05)

    expected = train(*parts(), 0, 8)
    first, second = parts(), parts()
    totals = train(*first, 0, 5)
    for old, new in zip(first, second, strict=True):
        new.load_state_dict(copy.deepcopy(old.state_dict()))
    assert totals + train(*second, 5, 8) == expected


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (
            lambda w: [w.sum(), torch.tensor(1.0)],
            r"`losses\[1\]` does not depend on `shared`: pass parameters that all",
        ),
        (lambda w: [torch.ones(1, requires_grad=True).sum(), w.sum()], r"`losses\[0\]` does not depend on `shared`"),
    ],
)
def test_a_loss_apart_from_the_shared_layer_is_an_error(losses, message):
    shared = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match=message):
        GradNorm(2)(losses(shared), shared)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": -1}, r"`alpha` must be a finite number, at least 0, got -1"),
        ({"lr": 0}, r"`lr` must be a finite number, above 0, got 0"),
        ({"initial_loss": [1.0]}, r"`initial_loss` must hold 2 losses, one for each task, got 1"),
        ({"initial_loss": [1.0, 0.0]}, r"`initial_loss` must be a finite number, above 0, got 0.0"),
    ],
)
def test_construction_checks(arguments, message):
    with pytest.raises(ValueError, match=message):
        GradNorm(2, **arguments)


def test_no_shared_parameter_is_an_error():
    with pytest.raises(ValueError, match=r"`shared` is empty: pass the parameters of the last layer"):
        GradNorm(1)([torch.ones((), requires_grad=True)], [])


def test_a_loss_below_zero_counts_as_learnt():
    weight, norms = torch.ones(3), torch.tensor([1.0, 2.0, 3.0])
    below = gradnorm_weights(weight, norms, torch.tensor([-0.5, 0.5, 1.0]))
    torch.testing.assert_close(below, gradnorm_weights(weight, norms, torch.tensor([0.0, 0.5, 1.0])))
    assert below[0] < gradnorm_weights(weight, norms, torch.tensor([2.0, 0.5, 1.0]))[0]
