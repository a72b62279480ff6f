"""Penalties that an optimiser applies after its steps: exact zeros, the right solution, and no step too many."""

from __future__ import annotations

import copy
import gc
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from losses.reliance._blocks import shrink_blocks
from losses.reliance.elastic_net import ElasticNetPenalty
from losses.reliance.group_lasso import GroupLassoPenalty

PENALTIES = [lambda: ElasticNetPenalty(0.03, 0.0), lambda: GroupLassoPenalty(0.03)]
both = pytest.mark.parametrize("build", PENALTIES, ids=["elastic net", "group lasso"])


def regression():
    """Ten features, of which three decide three outputs."""
    data, weight = torch.randn(128, 10), torch.zeros(3, 10)
    weight[:, :3] = torch.randn(3, 3).sign() * (1 + torch.rand(3, 3))
    return data, data @ weight.T + 0.1 * torch.randn(128, 3)


def fit(layer, optimizer, data, target, steps, penalty=None, batch=None):
    for step in range(steps):
        rows = slice(None) if batch is None else torch.arange(step * batch, (step + 1) * batch) % len(data)
        loss = F.mse_loss(layer(data[rows]), target[rows])
        if penalty is not None:
            loss = loss + penalty(layer.weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@both
@pytest.mark.parametrize("batch", [None, 32])
def test_adamw_gets_exact_zeros_for_useless_features_only(build, batch):
    (data, target), layer, penalty = regression(), nn.Linear(10, 3), build()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.03)
    penalty.attach(optimizer, layer.weight)
    fit(layer, optimizer, data, target, 350, batch=batch)
    assert layer.weight[:, 3:].eq(0).all()
    assert layer.weight[:, :3].ne(0).all()
    assert F.mse_loss(layer(data), target) < 0.05


@both
def test_a_penalty_in_the_loss_gives_no_zeros_with_adamw(build):
    (data, target), layer = regression(), nn.Linear(10, 3)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.03)
    fit(layer, optimizer, data, target, 350, penalty=build())
    assert layer.weight.ne(0).all()
    assert layer.weight[:, 3:].abs().max() < 0.05


@both
def test_the_plain_learning_rate_gives_no_zeros_with_adamw(build):
    """Adam moves a useless weight by a full step, however small its gradient: the threshold must grow with it."""
    (data, target), layer = regression(), nn.Linear(10, 3)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.03)
    build().attach(optimizer, layer.weight, adaptive=False)
    fit(layer, optimizer, data, target, 350)
    assert layer.weight.ne(0).any(dim=0).all()


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "NAdam", "Adam (amsgrad)"])
def test_elastic_net_reaches_the_solution_of_scikit_learn(optimizer):
    linear_model = pytest.importorskip("sklearn.linear_model")
    data, target = (part.double() for part in regression())
    expected = linear_model.ElasticNet(alpha=0.2, l1_ratio=0.7, fit_intercept=False, tol=1e-10).fit(data, target).coef_
    weight = nn.Parameter(0.1 * torch.randn(3, 10).double())
    solve(weight, data, target, optimizer, ElasticNetPenalty(0.2 * 0.7, 0.2 * 0.3 / 2))
    np.testing.assert_allclose(weight.detach().numpy(), expected, atol=1e-4)
    assert np.array_equal(weight.detach().numpy() == 0, expected == 0)
    assert (expected == 0).any()


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_group_lasso_reaches_the_solution_of_scikit_learn(optimizer):
    linear_model = pytest.importorskip("sklearn.linear_model")
    data, target = (part.double() for part in regression())
    expected = linear_model.MultiTaskLasso(alpha=0.3, fit_intercept=False, tol=1e-10).fit(data, target).coef_
    weight = nn.Parameter(0.1 * torch.randn(3, 10).double())
    solve(weight, data, target, optimizer, GroupLassoPenalty(0.3 / 3**0.5))
    np.testing.assert_allclose(weight.detach().numpy(), expected, atol=1e-4)
    assert np.array_equal(weight.detach().numpy() == 0, expected == 0)
    assert (expected == 0).any()


def solve(weight, data, target, name, penalty):
    makers = {
        "SGD": lambda: torch.optim.SGD([weight], lr=0.3),
        "AdamW": lambda: torch.optim.AdamW([weight], lr=0.03, weight_decay=0.0),
        "NAdam": lambda: torch.optim.NAdam([weight], lr=0.03),
        "Adam (amsgrad)": lambda: torch.optim.Adam([weight], lr=0.03, amsgrad=True),
    }
    optimizer = makers[name]()
    penalty.attach(optimizer, weight)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 500, 0.1)
    for _ in range(700):
        optimizer.zero_grad()
        ((data @ weight.T - target).square().sum() / (2 * len(data))).backward()
        optimizer.step()
        schedule.step()


def test_blocks_with_thresholds_of_their_own_satisfy_the_optimality_condition():
    values = torch.randn(300, 6).double()
    thresholds = 10 ** (2 * torch.rand(300, 6).double()) * 10 ** (3 * torch.rand(300, 1).double() - 3)
    new = shrink_blocks(values, thresholds, None)
    norm = new.norm(dim=1, keepdim=True)
    kept = norm[:, 0] > 0
    assert 30 < kept.sum() < 270
    torch.testing.assert_close((new + thresholds * new / norm)[kept], values[kept], rtol=1e-4, atol=1e-4)
    assert new[~kept].eq(0).all()
    assert ((values / thresholds)[~kept].norm(dim=1) <= 1).all()


def test_each_group_of_parameters_shrinks_at_its_own_current_rate():
    first, second = nn.Parameter(torch.ones(1, 2)), nn.Parameter(torch.ones(1, 2))
    optimizer = torch.optim.SGD([{"params": [first], "lr": 0.1}, {"params": [second], "lr": 0.2}], lr=9.0)
    ElasticNetPenalty(1.0, 0.0).attach(optimizer, [first, second])
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for _ in range(2):
        first.grad, second.grad = torch.zeros(1, 2), torch.zeros(1, 2)
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(first.detach(), torch.full((1, 2), 1 - 0.1 - 0.05))
    torch.testing.assert_close(second.detach(), torch.full((1, 2), 1 - 0.2 - 0.1))


@both
def test_a_learning_rate_may_be_a_tensor(build):
    weights = [nn.Parameter(torch.tensor([[0.3, -2.0], [0.1, 1.0]])) for _ in range(2)]
    for weight, rate in zip(weights, (0.5, torch.tensor(0.5)), strict=True):
        optimizer = torch.optim.SGD([weight], lr=rate)
        build().attach(optimizer, weight)
        weight.grad = torch.ones(2, 2)
        optimizer.step()
    assert torch.equal(*weights)


@both
def test_a_weight_without_a_gradient_stays(build):
    used, frozen = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2, 3))
    optimizer = torch.optim.AdamW([used, frozen])
    build().attach(optimizer, [used, frozen])
    used.grad = torch.zeros(2, 3)
    optimizer.step()
    assert used.lt(1).all()
    assert frozen.eq(1).all()


@both
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_shrinks_nothing(build, fused):
    layer, scaler = nn.Linear(4, 3), torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=fused)
    build().attach(optimizer, layer.weight)
    for broken in (True, False, True):
        before = layer.weight.detach().clone()
        loss = layer(torch.ones(2, 4)).square().mean() * (float("inf") if broken else 1.0)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(layer.weight, before) is broken
        assert layer.weight.isfinite().all()


@both
def test_fused_and_plain_steps_agree(build):
    layers = [nn.Linear(4, 3) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    data = torch.randn(20, 4)
    for layer, fused in zip(layers, (False, True), strict=True):
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.02, fused=fused)
        build().attach(optimizer, layer.weight)
        fit(layer, optimizer, data, data[:, :3], 20)
    torch.testing.assert_close(layers[0].weight, layers[1].weight)


def test_a_tied_weight_is_shrunk_once():
    embedding, head = nn.Embedding(3, 2), nn.Linear(2, 3, bias=False)
    head.weight = embedding.weight
    with torch.no_grad():
        head.weight.fill_(1.0)
    optimizer = torch.optim.SGD(nn.ModuleList([embedding, head]).parameters(), lr=0.1)
    ElasticNetPenalty(1.0, 0.0).attach(optimizer, [embedding.weight, head.weight])
    head.weight.grad = torch.zeros(3, 2)
    optimizer.step()
    torch.testing.assert_close(head.weight.detach(), torch.full((3, 2), 0.9))


@pytest.mark.parametrize(("l1", "l2"), [(0.1, 0.0), (0.0, 0.1), (0.1, 0.1)])
def test_what_nobody_has_moved_yet_does_not_vanish_at_once(l1, l2):
    """Adam's estimate of a gradient that was always zero is zero: its metric alone would allow any step."""
    embedding = nn.Embedding(4, 2)
    optimizer = torch.optim.AdamW(embedding.parameters(), lr=1e-3, weight_decay=0.0)
    before = embedding.weight.detach().clone()
    ElasticNetPenalty(l1, l2, dim=0).attach(optimizer, embedding.weight)
    embedding(torch.tensor([1])).sum().backward()
    optimizer.step()
    torch.testing.assert_close(embedding.weight[3].detach(), before[3], rtol=0, atol=0.0101)


def test_it_ends_with_its_handle():
    weight, penalty = nn.Parameter(torch.ones(1, 2)), ElasticNetPenalty(1.0, 0.0)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    handle = penalty.attach(optimizer, weight)
    assert penalty.attached
    handle.remove()
    assert not penalty.attached
    weight.grad = torch.zeros(1, 2)
    optimizer.step()
    assert weight.eq(1).all()
    assert penalty(weight).requires_grad
    penalty.attach(optimizer, weight)  # and may begin again


def test_while_attached_its_value_is_a_constant():
    layer, penalty = nn.Linear(4, 3), ElasticNetPenalty(0.5, 0.25)
    expected = penalty(layer.weight).detach()
    optimizer = torch.optim.AdamW(layer.parameters())
    penalty.attach(optimizer, layer.weight)
    value = penalty(layer.weight)
    torch.testing.assert_close(value, expected)
    assert not value.requires_grad
    del optimizer
    gc.collect()
    assert penalty(layer.weight).requires_grad


@both
def test_a_penalty_that_is_attached_to_one_weight_still_teaches_the_others(build):
    shrunk, other = nn.Linear(4, 3), nn.Linear(4, 3)
    penalty = build()
    expected = [penalty(weights).detach() for weights in (other.weight, [shrunk.weight, other.weight])]
    optimizer = torch.optim.AdamW(shrunk.parameters())
    handle = penalty.attach(optimizer, shrunk.weight)
    assert not penalty(shrunk.weight).requires_grad
    for weights, value in zip((other.weight, [shrunk.weight, other.weight]), expected, strict=True):
        other.weight.grad = None
        given = penalty(weights)
        given.backward()
        torch.testing.assert_close(given.detach(), value)
        assert other.weight.grad.ne(0).all()
        assert shrunk.weight.grad is None
    handle.remove()
    penalty([shrunk.weight, other.weight]).backward()
    assert shrunk.weight.grad.ne(0).all()


@both
def test_a_weight_that_shares_memory_with_an_attached_one_is_another(build):
    layer, penalty = nn.Linear(4, 3), build()
    optimizer = torch.optim.AdamW(layer.parameters())
    penalty.attach(optimizer, layer.weight)
    twin = nn.Parameter(layer.weight.data)
    penalty(twin).backward()
    assert twin.grad.ne(0).all()
    penalty(layer.weight[:, :2]).backward()  # so is a part of it
    assert layer.weight.grad[:, :2].ne(0).all()


def test_attaching_twice_is_refused():
    first, second, penalty = nn.Parameter(torch.ones(1, 2)), nn.Parameter(torch.ones(1, 2)), ElasticNetPenalty(1.0, 0.0)
    optimizer = torch.optim.SGD([first, second], lr=0.1)
    penalty.attach(optimizer, first)
    with pytest.raises(
        ValueError, match=r"`weights\[1\]` is attached to the optimizer already: it would be shrunk twice"
    ):
        penalty.attach(optimizer, [second, first])
    penalty.attach(optimizer, second)
    another = torch.optim.SGD([first, second], lr=0.1)  # as a second fit with the same module builds
    penalty.attach(another, [first, second])
    first.grad, second.grad = torch.zeros(1, 2), torch.zeros(1, 2)
    another.step()
    torch.testing.assert_close(first.detach(), torch.full((1, 2), 0.9))
    torch.testing.assert_close(second.detach(), torch.full((1, 2), 0.9))


def test_weights_that_the_optimizer_does_not_hold_are_refused():
    layer = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW([layer.bias])
    with pytest.raises(ValueError, match=r"`weights\[0\]` is not among the parameters of the optimizer"):
        ElasticNetPenalty(1.0, 0.0).attach(optimizer, layer.weight)
    with pytest.raises(ValueError, match=r"`weight\[0\]` must have an axis 1 of features"):
        ElasticNetPenalty(1.0, 0.0).attach(optimizer, layer.bias)
    with pytest.raises(ValueError, match="`weight` holds no tensor"):
        ElasticNetPenalty(1.0, 0.0).attach(optimizer, [])


def test_lightning_shrinks_once_for_every_step_of_the_optimizer():
    lightning = pytest.importorskip("pytorch_lightning")

    class Task(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer, self.penalty = nn.Linear(2, 1), ElasticNetPenalty(1.0, 0.0)
            nn.init.ones_(self.layer.weight)

        def training_step(self, batch, batch_index):
            return 0.0 * self.layer(batch).sum() + self.penalty(self.layer.weight)

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            self.penalty.attach(optimizer, self.layer.weight)
            return optimizer

    task, quiet = Task(), dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    options = {"accelerator": "cpu", "enable_model_summary": False, "accumulate_grad_batches": 2, **quiet}
    for fits in (1, 2):  # the second fit builds and attaches a second optimiser
        lightning.Trainer(max_epochs=1, **options).fit(
            task, torch.utils.data.DataLoader(torch.ones(6, 2), batch_size=1)
        )
        torch.testing.assert_close(task.layer.weight.detach(), torch.full((1, 2), 1 - 0.3 * fits))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.penalty = GroupLassoPenalty(1.0, num_features=4)


def test_a_copy_of_a_module_that_holds_both_is_its_own():
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.penalty.attach(optimizer, model.layer.weight)
    assert set(model.state_dict()) == {"layer.weight", "layer.bias", "penalty.feature_strength"}
    assert len(list(model.parameters())) == 2
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert model.penalty.attached
        assert not other.penalty.attached
        before = other.layer.weight.detach().clone()
        model.layer.weight.grad = torch.zeros(3, 4)
        optimizer.step()
        assert torch.equal(other.layer.weight, before)
        assert other.penalty(other.layer.weight).requires_grad
        other.penalty.attach(torch.optim.SGD(other.parameters(), lr=0.1), other.layer.weight)


def test_an_optimizer_that_is_saved_carries_no_hook():
    layer = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(layer.parameters())
    ElasticNetPenalty(1.0, 0.0).attach(optimizer, layer.weight)
    assert set(optimizer.state_dict()) == {"state", "param_groups"}
    pickle.loads(pickle.dumps(optimizer))


@both
def test_resumed_training_goes_on_exactly(build):
    data, target = regression()

    def begin():
        layer = nn.Linear(10, 3)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.02)
        build().attach(optimizer, layer.weight)
        return layer, optimizer

    whole, first, second = begin(), begin(), begin()
    first[0].load_state_dict(whole[0].state_dict())
    fit(*whole, data, target, 10)
    fit(*first, data, target, 5)
    for old, new in zip(first, second, strict=True):
        new.load_state_dict(copy.deepcopy(old.state_dict()))
    fit(*second, data, target, 5)
    assert torch.equal(second[0].weight, whole[0].weight)
