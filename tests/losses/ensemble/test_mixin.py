"""Learned mixin against its definition, its gate, and the sign of its penalty."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from losses import weighted_cross_entropy
from losses.ensemble import LearnedMixinLoss, learned_mixin_loss, product_of_experts_loss

GENERATOR = torch.Generator().manual_seed(13)


def randn(*shape):
    return torch.randn(*shape, generator=GENERATOR)


def labels(high, *shape):
    return torch.randint(high, shape, generator=GENERATOR)


def reference(logits, bias, gate, target, penalty):
    losses = []
    for n in range(logits.shape[0]):
        for position in np.ndindex(*logits.shape[2:]):
            model, expert = (np.exp(x[(n, slice(None), *position)].astype(np.float64)) for x in (logits, bias))
            trusted = (expert / expert.sum()) ** float(gate[(n, *position)])
            product = model / model.sum() * trusted
            shares = trusted / trusted.sum()
            loss = -np.log(product[int(target[(n, *position)])] / product.sum())
            losses.append(loss - penalty * np.sum(shares * np.log(shares)))
    return np.array(losses)


@pytest.mark.parametrize("positions", [(), (3,)])
@pytest.mark.parametrize("penalty", [0.0, 0.03, 1.0])
def test_against_loops(penalty, positions):
    logits, bias, target = randn(6, 4, *positions), 2 * randn(6, 4, *positions), labels(4, 6, *positions)
    gate = 2 * torch.rand(6, *positions)
    expected = reference(logits.numpy(), bias.numpy(), gate.numpy(), target.numpy(), penalty)
    each = learned_mixin_loss(logits, target, bias, gate, entropy_penalty=penalty, reduction="none")
    np.testing.assert_allclose(each.flatten().numpy(), expected, rtol=1e-5)
    mean = learned_mixin_loss(logits, target, bias, gate, entropy_penalty=penalty)
    assert mean.item() == pytest.approx(expected.mean(), rel=1e-5)


def test_gate_one_is_the_product_and_gate_zero_cross_entropy():
    logits, bias, target = randn(6, 4), randn(6, 4), labels(4, 6)
    one, zero = (learned_mixin_loss(logits, target, bias, torch.full((6,), g), entropy_penalty=0.0) for g in (1.0, 0.0))
    torch.testing.assert_close(one, product_of_experts_loss(logits, target, bias))
    torch.testing.assert_close(zero, F.cross_entropy(logits, target))


def test_the_penalty_is_added_and_keeps_the_gate_open():
    logits, bias, target = torch.zeros(1, 3), torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([1])
    gate = torch.tensor([0.1], requires_grad=True)
    shut = learned_mixin_loss(logits, target, bias, torch.zeros(1), entropy_penalty=1.0)
    assert shut.item() == pytest.approx(2 * math.log(3), rel=1e-5)  # the entropy is highest where the gate is shut
    push = {}
    for penalty in (0.0, 30.0):
        loss = learned_mixin_loss(logits, target, bias, gate, entropy_penalty=penalty)
        push[penalty] = torch.autograd.grad(loss, gate)[0].item()
    assert push[0.0] > 0  # a wrong expert: descent shuts the gate
    assert push[30.0] < 0  # descent opens it


def test_weights_multiply_loss_and_penalty():
    logits, bias, gate, target = randn(5, 3), randn(5, 3), torch.rand(5), torch.tensor([0, 1, -100, 2, 1])
    weight, sample_weight = torch.tensor([1.0, 3.0, 0.5]), torch.rand(5)
    plain = learned_mixin_loss(logits, target, bias, gate, entropy_penalty=2.0, reduction="none")
    arguments = {"class_weight": weight, "sample_weight": sample_weight, "entropy_penalty": 2.0}
    each = learned_mixin_loss(logits, target, bias, gate, reduction="none", **arguments)
    torch.testing.assert_close(each, plain * weight[target.clamp(min=0)] * sample_weight)
    assert each[2] == 0
    torch.testing.assert_close(learned_mixin_loss(logits, target, bias, gate, **arguments), each.sum() / 4)


def test_an_extreme_expert_and_gate_stay_finite():
    logits, gate = torch.zeros(2, 3, requires_grad=True), torch.tensor([0.0, 50.0], requires_grad=True)
    certain = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]).log()
    loss = learned_mixin_loss(logits, torch.tensor([0, 1]), certain, gate)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()
    assert gate.grad.isfinite().all()


def test_gradcheck():
    logits, gate = randn(4, 3).double().requires_grad_(), (torch.rand(4).double() + 0.1).requires_grad_()
    bias, target = randn(4, 3).double(), labels(3, 4)
    assert torch.autograd.gradcheck(
        lambda z, g: learned_mixin_loss(z, target, bias, g, entropy_penalty=0.5), (logits, gate)
    )


def test_module_is_the_function_of_a_softplus():
    logits, bias, target, hidden = randn(6, 4), randn(6, 4), labels(4, 6), randn(6, 5)
    module = LearnedMixinLoss(5, 0.2, class_weight=[1.0, 2.0, 3.0, 4.0], reduction="sum", ignore_index=3)
    gate = F.softplus(hidden @ module.gate.weight[0] + module.gate.bias)
    expected = learned_mixin_loss(
        logits,
        target,
        bias,
        gate,
        entropy_penalty=0.2,
        class_weight=torch.arange(1.0, 5.0),
        reduction="sum",
        ignore_index=3,
    )
    torch.testing.assert_close(module(logits, target, bias, hidden), expected)
    assert repr(module).startswith("LearnedMixinLoss(\n  5, entropy_penalty=0.2, reduction='sum', ignore_index=3\n")


def test_features_of_every_position():
    logits, bias, target, hidden = randn(2, 4, 3), randn(2, 4, 3), labels(4, 2, 3), randn(2, 3, 5)
    module = LearnedMixinLoss(5)
    first = module(logits[..., 0], target[:, 0], bias[..., 0], hidden[:, 0])
    whole = LearnedMixinLoss(5, reduction="none")
    whole.load_state_dict(module.state_dict())
    torch.testing.assert_close(whole(logits, target, bias, hidden)[:, 0].mean(), first)


def test_the_gate_learns_when_to_trust():
    hidden = torch.eye(2).repeat(50, 1)  # the first feature says: the expert is right here
    target = labels(3, 100)
    expert = F.one_hot(torch.where(hidden[:, 0] > 0, target, (target + 1) % 3), 3) * 3.0
    module = LearnedMixinLoss(2, entropy_penalty=0.0)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        module(torch.zeros(100, 3), target, expert, hidden).backward()
        optimizer.step()
    trust = F.softplus(module.gate(torch.eye(2)))[:, 0]
    assert trust[0] > 1.5
    assert trust[1] < 0.3


def test_a_checkpoint_of_a_plain_criterion_loads():
    model = nn.ModuleDict({"head": nn.Linear(5, 3), "criterion": LearnedMixinLoss(5, class_weight=[1.0, 2.0, 3.0])})
    plain = nn.ModuleDict({"head": nn.Linear(5, 3), "criterion": nn.CrossEntropyLoss()})
    before = model["criterion"].gate.weight.clone()
    with pytest.warns(UserWarning, match="lacks state"):
        model.load_state_dict(plain.state_dict(), strict=True)
    torch.testing.assert_close(model["criterion"].gate.weight, before)
    torch.testing.assert_close(model["head"].weight, plain["head"].weight)


def test_cross_entropy_takes_the_same_arguments():
    logits, target = randn(6, 4), labels(4, 6)
    expected = weighted_cross_entropy(logits, target, class_weight=torch.arange(1.0, 5.0))
    even = learned_mixin_loss(
        logits, target, torch.zeros(6, 4), torch.ones(6), entropy_penalty=0.0, class_weight=torch.arange(1.0, 5.0)
    )
    torch.testing.assert_close(even, expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"bias_logits": torch.zeros(6, 3)}, ValueError, r"`bias_logits` must have shape of `logits` = \(6, 4\)"),
        ({"gate": torch.ones(6, 1)}, ValueError, r"`gate` must have shape \(samples, positions...\) = \(6,\)"),
        ({"gate": -torch.ones(6)}, ValueError, "`gate` must be at least 0, got -1.0"),
        ({"entropy_penalty": -1.0}, ValueError, "`entropy_penalty` must be a finite number, at least 0, got -1.0"),
    ],
)
def test_checks(arguments, error, message):
    good = {"logits": torch.zeros(6, 4), "target": torch.zeros(6).long(), "bias_logits": torch.zeros(6, 4)}
    with pytest.raises(error, match=message):
        learned_mixin_loss(**{**good, "gate": torch.ones(6), **arguments})


def test_module_checks():
    with pytest.raises(ValueError, match="`hidden_size` must be at least 1, got 0"):
        LearnedMixinLoss(0)
    with pytest.raises(ValueError, match="`entropy_penalty` must be a finite number"):
        LearnedMixinLoss(5, -0.1)
    with pytest.raises(ValueError, match=r"`hidden` must have shape .* = \(6, 5\), got \(6, 7\)"):
        LearnedMixinLoss(5)(torch.zeros(6, 4), torch.zeros(6).long(), torch.zeros(6, 4), torch.zeros(6, 7))
