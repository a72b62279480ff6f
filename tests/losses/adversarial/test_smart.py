"""SMART against numpy and against its ascent written as a loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from losses.adversarial import SMARTLoss, smart_loss
from tests.losses.adversarial.test_virtual_adversarial import divergence, spied


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_against_numpy(reduction):
    model, inputs, seen = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(6, 5), []
    loss = smart_loss(spied(model, seen), inputs, epsilon=0.5, step_size=0.5, reduction=reduction)
    with torch.no_grad():
        clean, moved = model(inputs).double().numpy(), model(seen[-1]).double().numpy()
    expected = np.array([divergence(p, q) + divergence(q, p) for p, q in zip(clean, moved, strict=True)])
    expected = expected if reduction == "none" else getattr(expected, reduction)()
    np.testing.assert_allclose(loss.detach().numpy(), expected, rtol=1e-4)


def test_the_ascent_against_a_loop():
    weight = torch.randn(5, 3, dtype=torch.float64)
    inputs, seen = torch.randn(4, 5, dtype=torch.float64), []
    smart_loss(spied(lambda x: x @ weight, seen), inputs, epsilon=0.03, step_size=0.02, steps=3, noise=0.01)
    clean, points = seen[0], seen[1:]
    torch.testing.assert_close(clean, inputs)
    for sample in range(4):
        target = (inputs[sample] @ weight).softmax(dim=0)
        moved = points[0][sample] - inputs[sample]
        for point in points:
            torch.testing.assert_close(point[sample] - inputs[sample], moved)
            at = (inputs[sample] + moved).requires_grad_()
            q = (at @ weight).softmax(dim=0)
            ((target * (target / q).log()).sum() + (q * (q / target).log()).sum()).backward()
            moved = (moved + 0.02 * at.grad / at.grad.abs().max()).clamp(-0.03, 0.03)


def test_the_start_is_noise_of_the_given_size():
    seen = []
    smart_loss(spied(lambda x: x.mean(dim=1), seen), torch.zeros(4, 500, 3), noise=1e-3)
    assert seen[1].std().item() == pytest.approx(1e-3, rel=0.05)


def test_the_perturbation_stays_in_the_box():
    """And fills it: a step is as long as it says, however small the gradient."""
    model, inputs, seen = nn.Linear(5, 3), torch.randn(4, 5), []
    SMARTLoss()(spied(model, seen), inputs)
    assert (seen[-1] - inputs).abs().max() <= 0.1 + 1e-6
    assert (seen[-1] - inputs).abs().max() > 0.099


def transformer():
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    encoder, head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(32, 3)
    return lambda embeddings: head(encoder(embeddings)[:, 0])


def published_perturbation(model, embeddings):
    """Noise plus a thousandth of the gradient, divided by the largest entry of each token."""
    noise = 1e-5 * torch.randn_like(embeddings)
    at, clean = (embeddings + noise).requires_grad_(), model(embeddings).log_softmax(dim=1).detach()
    (gradient,) = torch.autograd.grad(
        F.kl_div(model(at).log_softmax(dim=1), clean, log_target=True, reduction="sum"), at
    )
    moved = noise + 1e-3 * gradient
    return noise, moved / (moved.abs().amax(dim=-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_the_default_has_a_useful_size(seed):
    """The order of the published code's, whose change is large and all but random; not that of the paper's box."""
    torch.manual_seed(seed)
    model, embeddings = transformer(), torch.randn(8, 10, 32)
    loss = SMARTLoss()(model, embeddings)
    assert 1e-3 < loss < 0.1
    noise, published = published_perturbation(model, embeddings)
    assert F.cosine_similarity(noise.flatten(), published.flatten(), dim=0) > 0.95  # tokens are scaled one by one
    one, other = (model(at).log_softmax(dim=1) for at in (embeddings, embeddings + published))
    assert 0.1 < loss / ((one.exp() - other.exp()) * (one - other)).sum(dim=1).mean() < 2
    assert smart_loss(model, embeddings, epsilon=1e-5, step_size=1e-3) < 1e-8


def test_both_predictions_get_the_gradient():
    model, inputs, seen = nn.Linear(5, 3), torch.randn(4, 5), []
    smart_loss(spied(model, seen), inputs, epsilon=0.3, step_size=0.3).backward()
    given = model.weight.grad.clone()
    model.zero_grad()
    p, q = model(inputs).log_softmax(dim=1), model(seen[-1]).log_softmax(dim=1)
    both = F.kl_div(p, q, log_target=True, reduction="batchmean") + F.kl_div(
        q, p, log_target=True, reduction="batchmean"
    )
    both.backward()
    torch.testing.assert_close(given, model.weight.grad)


def test_a_model_that_ignores_its_input_costs_nothing():
    bias = torch.randn(3, requires_grad=True)
    loss = smart_loss(lambda x: x @ torch.zeros(5, 3) + bias, torch.randn(4, 5))
    loss.backward()
    assert loss.item() == 0.0
    torch.testing.assert_close(bias.grad, torch.zeros(3))


def test_dropout_alone_costs_nothing():
    model = nn.Sequential(nn.Linear(5, 50), nn.Dropout(0.5), nn.Linear(50, 3))
    assert SMARTLoss(epsilon=0)(model, torch.randn(4, 5)).item() == 0.0


def test_a_sample_with_an_empty_mask_leaves_the_mean():
    model, inputs = nn.Linear(5, 3), torch.randn(3, 5)
    arguments = {"epsilon": 0.3, "step_size": 0.3, "mask": torch.tensor([[1], [0], [1]])}
    torch.manual_seed(1)
    each = smart_loss(model, inputs, reduction="none", **arguments)
    torch.manual_seed(1)
    mean = smart_loss(model, inputs, **arguments)
    assert each[1].item() == 0.0
    torch.testing.assert_close(mean, (each[0] + each[2]) / 2)


def test_a_class_that_is_ruled_out_keeps_everything_finite():
    model, ruled_out = nn.Linear(5, 3), torch.tensor([0.0, 0.0, -torch.inf])
    loss = smart_loss(lambda x: model(x) + ruled_out, torch.randn(4, 5), epsilon=0.1, step_size=0.1)
    loss.backward()
    assert loss.item() > 0
    assert model.weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_still_has_a_loss(dtype):
    net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
    inputs = torch.randn(8, 4)
    expected = SMARTLoss()(net, inputs)
    loss = SMARTLoss()(net.to(dtype), inputs.to(dtype))
    assert expected / 3 < loss < 3 * expected
    loss.backward()
    assert net[0].weight.grad.ne(0).any()
