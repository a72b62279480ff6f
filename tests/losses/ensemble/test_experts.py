"""Product of experts against its definition, its degenerate experts, and a model that unlearns a shortcut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from losses import weighted_cross_entropy
from losses.ensemble import ProductOfExpertsLoss, product_of_experts_loss

GENERATOR = torch.Generator().manual_seed(12)


def randn(*shape):
    return torch.randn(*shape, generator=GENERATOR)


def labels(high, *shape):
    return torch.randint(high, shape, generator=GENERATOR)


def reference(logits, bias, target):
    """Multiply the two distributions of each sample and position, and normalise."""
    losses = []
    for n in range(logits.shape[0]):
        for position in np.ndindex(*logits.shape[2:]):
            model, expert = (np.exp(x[(n, slice(None), *position)].astype(np.float64)) for x in (logits, bias))
            product = model / model.sum() * (expert / expert.sum())
            losses.append(-np.log(product[int(target[(n, *position)])] / product.sum()))
    return np.array(losses)


@pytest.mark.parametrize("positions", [(), (3,)])
def test_against_loops(positions):
    logits, bias, target = randn(6, 4, *positions), 3 * randn(6, 4, *positions), labels(4, 6, *positions)
    expected = reference(logits.numpy(), bias.numpy(), target.numpy())
    each = product_of_experts_loss(logits, target, bias, reduction="none")
    np.testing.assert_allclose(each.flatten().numpy(), expected, rtol=1e-5)
    assert product_of_experts_loss(logits, target, bias).item() == pytest.approx(expected.mean(), rel=1e-5)


def test_logits_and_log_probabilities_of_the_expert_are_alike():
    logits, bias, target = randn(6, 4), randn(6, 4), labels(4, 6)
    torch.testing.assert_close(
        product_of_experts_loss(logits, target, bias.log_softmax(dim=1)),
        product_of_experts_loss(logits, target, bias + 7),
    )


def test_an_even_expert_gives_cross_entropy():
    logits, target, weight, sample_weight = randn(6, 4), labels(4, 6), torch.rand(4), torch.rand(6)
    target[0] = -100
    arguments = {"class_weight": weight, "sample_weight": sample_weight}
    expected = weighted_cross_entropy(logits, target, **arguments)
    torch.testing.assert_close(product_of_experts_loss(logits, target, torch.ones(6, 4), **arguments), expected)


def test_an_expert_on_the_class_shares_gives_the_logit_adjusted_loss():
    logits, target, shares = randn(6, 4), labels(4, 6), torch.tensor([0.5, 0.3, 0.15, 0.05])
    expected = F.cross_entropy(logits + shares.log(), target)
    torch.testing.assert_close(product_of_experts_loss(logits, target, shares.log().expand(6, 4)), expected)


def test_no_gradient_reaches_the_expert():
    logits, bias = randn(6, 4).requires_grad_(), randn(6, 4).requires_grad_()
    product_of_experts_loss(logits, labels(4, 6), bias).backward()
    assert logits.grad.ne(0).any()
    assert bias.grad is None


def test_a_certain_and_wrong_expert_costs_a_finite_amount():
    logits = torch.zeros(2, 2, requires_grad=True)
    certain = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).log()
    losses = product_of_experts_loss(logits, torch.tensor([0, 1]), certain, reduction="none")
    losses.sum().backward()
    torch.testing.assert_close(losses.detach(), torch.tensor([0.0, 100.0]))
    torch.testing.assert_close(logits.grad, torch.tensor([[0.0, 0.0], [1.0, -1.0]]))


def test_the_model_leaves_the_shortcut_to_the_expert():
    target = torch.arange(200) % 2
    signs = 2.0 * target - 1
    shortcut = torch.where(torch.arange(200) < 190, signs, -signs)  # right for 95 %
    signal = signs + 1.5 * torch.randn(200, generator=torch.Generator().manual_seed(0))
    inputs, expert = torch.stack([signal, shortcut], dim=1), torch.stack([-shortcut, shortcut], dim=1) * np.log(19) / 2
    slopes = []
    for loss in (lambda z: F.cross_entropy(z, target), lambda z: product_of_experts_loss(z, target, expert)):
        model = nn.Linear(2, 2)
        nn.init.zeros_(model.weight)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        for _ in range(100):
            optimizer.zero_grad()
            loss(model(inputs)).backward()
            optimizer.step()
        slopes.append((model.weight[1] - model.weight[0]).detach())
    assert slopes[0][1] > 2  # cross entropy takes the shortcut
    assert slopes[1][1].abs() < 0.3
    assert slopes[1][0] > 0.5


def test_gradcheck():
    logits, bias, target = randn(4, 3, 2).double().requires_grad_(), randn(4, 3, 2).double(), labels(3, 4, 2)
    target[0, 0] = -100
    assert torch.autograd.gradcheck(lambda z: product_of_experts_loss(z, target, bias), (logits,))


def test_module_is_the_function():
    logits, bias, target, weight = randn(6, 4), randn(6, 4), labels(4, 6), torch.rand(4)
    module = ProductOfExpertsLoss(class_weight=weight, reduction="sum", ignore_index=2)
    expected = product_of_experts_loss(logits, target, bias, class_weight=weight, reduction="sum", ignore_index=2)
    torch.testing.assert_close(module(logits, target, bias), expected)
    other = torch.rand(4)
    module.set_class_weight(other)
    expected = product_of_experts_loss(logits, target, bias, class_weight=other, reduction="sum", ignore_index=2)
    torch.testing.assert_close(module(logits, target, bias), expected)
    assert repr(module) == "ProductOfExpertsLoss(reduction='sum', ignore_index=2)"


@pytest.mark.parametrize(
    ("bias", "error", "message"),
    [
        (torch.zeros(6, 3), ValueError, r"`bias_logits` must have shape of `logits` = \(6, 4\), got \(6, 3\)"),
        (None, TypeError, "`bias_logits` must be a tensor of shape of `logits`"),
    ],
)
def test_checks(bias, error, message):
    with pytest.raises(error, match=message):
        product_of_experts_loss(torch.zeros(6, 4), torch.zeros(6).long(), bias)


def test_the_expert_cannot_be_forgotten():
    with pytest.raises(TypeError, match="bias_logits"):
        ProductOfExpertsLoss()(torch.zeros(6, 4), torch.zeros(6).long())
