"""Gradient surgery against projections by hand, and how it lives in a loop: accumulation, scaling, heads, failures."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import nn

from losses.balancing import GradientSurgery

AGGREGATORS = ("pcgrad", "upgrad")


def combined(rows, aggregator):
    """Return what surgery makes of losses whose gradients are ``rows``."""
    weight = torch.zeros(rows.shape[1], requires_grad=True)
    GradientSurgery(aggregator).backward([row @ weight for row in rows], [weight])
    return weight.grad


def pcgrad(first, second):
    """Algorithm 1 of the paper for two tasks, where the order cannot matter."""
    product = first @ second
    if product >= 0:
        return first + second
    return first - product / (second @ second) * second + second - product / (first @ first) * first


@pytest.mark.parametrize("seed", range(6))
def test_pcgrad_for_two_tasks_against_the_paper(seed):
    rows = torch.randn(2, 5, generator=torch.Generator().manual_seed(seed))
    expected = pcgrad(*rows.double().numpy())
    np.testing.assert_allclose(combined(rows, "pcgrad"), expected, rtol=1e-4, atol=1e-5)


def test_pcgrad_cases_are_of_both_kinds():
    """The seeds above hold conflicts and agreements."""
    rows = [torch.randn(2, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
    assert {bool(row[0] @ row[1] < 0) for row in rows} == {True, False}


@pytest.mark.parametrize("tasks", [2, 3, 6])
@pytest.mark.parametrize("seed", range(4))
def test_upgrad_works_against_no_task(tasks, seed):
    rows = torch.randn(tasks, 4, generator=torch.Generator().manual_seed(seed))
    assert (rows @ combined(rows, "upgrad")).min() > -1e-4


def test_the_plain_sum_and_pcgrad_may_work_against_a_task():
    rows = torch.tensor([[1.0, 0.0], [-3.0, 1.0], [-3.0, -1.0]])
    assert (rows @ rows.sum(dim=0)).min() < 0
    assert (rows @ combined(rows, "pcgrad")).min() < 0
    assert (rows @ combined(rows, "upgrad")).min() > -1e-4


def test_tasks_that_agree_are_added_or_averaged():
    rows = torch.rand(3, 4)
    torch.testing.assert_close(combined(rows, "pcgrad"), rows.sum(dim=0))
    torch.testing.assert_close(combined(rows, "upgrad"), rows.mean(dim=0))


def test_any_aggregator_will_do():
    from torchjd.aggregation import MGDA

    rows = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    torch.testing.assert_close(combined(rows, MGDA()), torch.tensor([0.8, 0.4]), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(combined(rows, lambda jacobian: jacobian[1]), rows[1])


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.shared = nn.Linear(4, 3)
        self.heads = nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 1)])
        self.heads[1].load_state_dict(self.heads[0].state_dict())  # equal heads, opposite targets: tasks in conflict
        self.unused, self.frozen = nn.Linear(2, 2), nn.Linear(3, 3).requires_grad_(False)

    def losses(self, data):
        features = self.frozen(self.shared(data).tanh())
        target = data[:, :1]
        return [(self.heads[0](features) - target).square().mean(), (self.heads[1](features) + target).square().mean()]


@pytest.fixture
def data():
    return torch.randn(16, 4)


def vector(parameters):
    return torch.cat([parameter.grad.flatten() for parameter in parameters])


@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_heads_get_the_gradient_of_their_loss(aggregator, data):
    model, plain = Model(), Model()
    GradientSurgery(aggregator).backward(model.losses(data), model.parameters())
    sum(plain.losses(data)).backward()
    for ours, theirs in zip(model.heads.parameters(), plain.heads.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert not torch.allclose(vector(model.shared.parameters()), vector(plain.shared.parameters()))
    assert all(parameter.grad is None for layer in (model.unused, model.frozen) for parameter in layer.parameters())


def test_heads_do_not_decide_about_the_shared_layer(data):
    model, trunk = Model(), Model()
    GradientSurgery("pcgrad").backward(model.losses(data), model.parameters())
    GradientSurgery("pcgrad").backward(trunk.losses(data), trunk.shared.parameters())
    torch.testing.assert_close(vector(model.shared.parameters()), vector(trunk.shared.parameters()))
    assert trunk.heads[0].weight.grad is None


@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_accumulation_adds_up(aggregator, data):
    model, surgery = Model(), GradientSurgery(aggregator)
    surgery.backward(model.losses(data), model.parameters())
    first = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    surgery.backward(model.losses(data), model.parameters())
    for name, parameter in model.named_parameters():
        if name in first:
            torch.testing.assert_close(parameter.grad, 2 * first[name])
            assert parameter.grad is grads[name]


@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_scaled_losses_are_unscaled_by_the_scaler(aggregator, data):
    model, plain, surgery = Model(), Model(), GradientSurgery(aggregator)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    surgery.backward(model.losses(data), model.parameters(), scaler=scaler)
    surgery.backward(plain.losses(data), plain.parameters())
    torch.testing.assert_close(model.shared.weight.grad, 2.0**12 * plain.shared.weight.grad, rtol=1e-4, atol=1e-3)
    scaler.step(optimizer)
    torch.testing.assert_close(model.shared.weight.grad, plain.shared.weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_a_scaled_step_that_overflows_is_skipped(aggregator, data):
    model = Model()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = model.shared.weight.detach().clone()
    first, second = model.losses(data)
    GradientSurgery(aggregator).backward([first, second * 1e38], model.parameters(), scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(model.shared.weight, before)
    assert scaler.get_scale() < 2.0**12


@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_half_precision_is_combined_in_float32(aggregator):
    model, single = Model().bfloat16(), Model()
    single.load_state_dict(model.state_dict())
    data = torch.randn(8, 4).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        GradientSurgery(aggregator).backward(model.losses(data), model.parameters())
    GradientSurgery(aggregator).backward(single.losses(data.float()), single.parameters())
    assert model.shared.weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(model.shared.weight.grad.float(), single.shared.weight.grad, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_a_loop_lowers_both_losses(aggregator, data):
    model, surgery = Model(), GradientSurgery(aggregator)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    start = [loss.item() for loss in model.losses(data)]
    for _ in range(50):
        optimizer.zero_grad()
        surgery.backward(model.losses(data), model.parameters())
        optimizer.step()
    assert all(end.item() < begin for end, begin in zip(model.losses(data), start, strict=True))


@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_nothing_is_left_on_the_parameters(aggregator, data):
    model = Model()
    GradientSurgery(aggregator).backward(model.losses(data), model.parameters())
    assert not any(hasattr(parameter, "jac") for parameter in model.parameters())
    assert all(parameter.grad is None or not parameter.grad.requires_grad for parameter in model.parameters())


def test_a_failing_aggregator_leaves_the_gradients(data):
    def fail(jacobian):
        raise RuntimeError("no solution")

    model = Model()
    with pytest.raises(RuntimeError, match="no solution"):
        GradientSurgery(fail).backward(model.losses(data), model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_graph_is_kept_on_demand(data):
    model, surgery = Model(), GradientSurgery("pcgrad")
    losses = model.losses(data)
    surgery.backward(losses, model.parameters(), retain_graph=True)
    surgery.backward(losses, model.parameters())
    with pytest.raises(RuntimeError, match="second time"):
        surgery.backward(losses, model.parameters())


def test_a_constant_loss_changes_nothing_for_pcgrad():
    weight = torch.ones(2, requires_grad=True)
    GradientSurgery("pcgrad").backward([weight.sum(), 2 * weight.sum(), torch.tensor(3.0)], [weight])
    torch.testing.assert_close(weight.grad, torch.full((2,), 3.0))


def test_without_torchjd_the_error_names_the_extra(monkeypatch):
    for module in [name for name in sys.modules if name.partition(".")[0] == "torchjd"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "torchjd", None)
    with pytest.raises(ImportError, match=r"needs torchjd and scipy: pip install attn-callbacks\[surgery\]"):
        GradientSurgery()
    assert repr(GradientSurgery(torch.sum)).startswith("GradientSurgery(")  # torchjd is for the named ones


@pytest.mark.parametrize(
    ("losses", "error", "message"),
    [
        ([], ValueError, r"`losses` holds no loss"),
        (torch.ones(2), TypeError, r"`losses` must be a sequence of scalars, one for each task, got a tensor of shape"),
        ([torch.ones(2)], ValueError, r"`losses\[0\]` must be a scalar, got shape \(2,\). Reduce it first"),
        ([1.0], TypeError, r"`losses\[0\]` must be a scalar tensor, got float"),
        ([torch.tensor(1.0)], ValueError, r"No loss depends on `parameters`: pass the parameters of the model"),
    ],
)
def test_checks(losses, error, message):
    with pytest.raises(error, match=message):
        GradientSurgery("pcgrad").backward(losses, [torch.ones(2, requires_grad=True)])


def test_construction():
    with pytest.raises(ValueError, match=r"`aggregator` must be one of 'pcgrad', 'upgrad', got 'sum'"):
        GradientSurgery("sum")
    assert repr(GradientSurgery("pcgrad")) == "GradientSurgery('pcgrad')"
    weight = torch.ones(2)
    with pytest.raises(ValueError, match="No loss depends on `parameters`"):
        GradientSurgery("pcgrad").backward([torch.tensor(1.0)], [weight])
