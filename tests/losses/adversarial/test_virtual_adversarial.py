"""Virtual adversarial training against numpy, against eigenvectors, and against slips of public code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from losses.adversarial import VirtualAdversarialLoss, virtual_adversarial_loss


def softmax(logits):
    exponential = np.exp(logits - logits.max())
    return exponential / exponential.sum()


def divergence(reference, other):
    p, q = softmax(reference), softmax(other)
    return sum(p[c] * (np.log(p[c]) - np.log(q[c])) for c in range(len(p)))


def spied(model, seen):
    def forward_logits(inputs):
        seen.append(inputs.detach().clone())
        return model(inputs)

    return forward_logits


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_against_numpy(reduction):
    model, inputs, seen = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(6, 5), []
    loss = virtual_adversarial_loss(spied(model, seen), inputs, epsilon=1.5, reduction=reduction)
    with torch.no_grad():
        clean, moved = model(inputs).double().numpy(), model(seen[-1]).double().numpy()
    expected = np.array([divergence(*pair) for pair in zip(clean, moved, strict=True)])
    expected = expected if reduction == "none" else getattr(expected, reduction)()
    np.testing.assert_allclose(loss.detach().numpy(), expected, rtol=1e-4)
    torch.testing.assert_close((seen[-1] - inputs).norm(dim=1), torch.full((6,), 1.5))


def test_the_clean_prediction_is_the_reference_of_the_divergence():
    """`F.kl_div(log p, q)` with the arguments swapped, as in public code, is another number."""
    weight, seen = torch.tensor([[3.0, 0.0], [0.0, 0.0]]), []
    inputs = torch.tensor([[1.0, 0.0]])
    loss = virtual_adversarial_loss(spied(lambda x: x @ weight, seen), inputs, epsilon=0.5)
    clean, moved = (inputs @ weight).log_softmax(1), (seen[-1] @ weight).log_softmax(1)
    torch.testing.assert_close(loss, F.kl_div(moved, clean, log_target=True, reduction="batchmean"))
    assert not torch.isclose(loss, F.kl_div(clean, moved, log_target=True, reduction="batchmean"), rtol=0.1)


def test_the_direction_converges_to_the_top_eigenvector():
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    inputs, seen = torch.randn(1, 6, generator=generator, dtype=torch.float64), []
    virtual_adversarial_loss(spied(lambda x: x @ weight, seen), inputs, xi=1e-3, steps=60)
    probabilities = (inputs @ weight).softmax(dim=1)[0]
    hessian = weight @ (torch.diag(probabilities) - torch.outer(probabilities, probabilities)) @ weight.T
    top = torch.linalg.eigh(hessian).eigenvectors[:, -1]
    torch.testing.assert_close((seen[-1] - inputs)[0].dot(top).abs().item(), 1.0, rtol=0, atol=1e-5)
    first = (seen[1] - inputs)[0]
    assert first.dot(top).abs() / first.norm() < 0.99


def test_a_model_that_ignores_its_input_costs_nothing():
    bias = torch.randn(3, requires_grad=True)
    loss = virtual_adversarial_loss(lambda x: x @ torch.zeros(5, 3) + bias, torch.randn(4, 5))
    loss.backward()
    assert loss.item() == 0.0
    torch.testing.assert_close(bias.grad, torch.zeros(3))


def test_dropout_alone_costs_nothing():
    """In public code each forward draws its own mask, and the loss is not zero without a perturbation."""
    model = nn.Sequential(nn.Linear(5, 50), nn.Dropout(0.5), nn.Linear(50, 3))
    assert VirtualAdversarialLoss(epsilon=0)(model, torch.randn(4, 5)).item() == 0.0


def test_the_clean_prediction_gets_no_gradient():
    model, inputs, seen = nn.Linear(5, 3), torch.randn(4, 5), []
    virtual_adversarial_loss(spied(model, seen), inputs).backward()
    given = model.weight.grad.clone()
    model.zero_grad()
    clean = model(inputs).detach().log_softmax(dim=1)
    F.kl_div(model(seen[-1]).log_softmax(dim=1), clean, log_target=True, reduction="batchmean").backward()
    torch.testing.assert_close(given, model.weight.grad)


def test_a_sample_with_an_empty_mask_leaves_the_mean():
    model, inputs, seen = nn.Linear(5, 3), torch.randn(3, 5), []
    mask = torch.tensor([[True], [False], [True]])
    torch.manual_seed(1)
    each = virtual_adversarial_loss(model, inputs, mask=mask, reduction="none")
    torch.manual_seed(1)
    mean = virtual_adversarial_loss(spied(model, seen), inputs, mask=mask)
    assert each[1].item() == 0.0
    torch.testing.assert_close(mean, (each[0] + each[2]) / 2)
    assert torch.equal(seen[-1][1], inputs[1])


def test_predictions_of_tokens_that_do_not_count():
    model, embeddings = nn.Linear(6, 3), torch.randn(2, 4, 6)
    valid = torch.tensor([[True, True, False, False], [True, True, True, True]])
    seen = []

    def forward_logits(x):
        seen.append(x.detach().clone())
        return model(x).movedim(-1, 1)

    torch.manual_seed(1)
    each = virtual_adversarial_loss(forward_logits, embeddings, valid=valid, reduction="none")
    assert each.shape == (2, 4)
    assert each[~valid].eq(0).all()
    assert each[valid].gt(0).all()
    assert (seen[-1] - embeddings)[~valid].eq(0).all()  # nothing is gained there, so no length is spent there
    torch.manual_seed(1)
    mean = virtual_adversarial_loss(forward_logits, embeddings, valid=valid.long())
    torch.testing.assert_close(mean, each.sum() / 6)


def test_nothing_valid_is_a_finite_zero():
    model = nn.Linear(5, 3)
    loss = virtual_adversarial_loss(model, torch.randn(2, 5), valid=torch.zeros(2))
    loss.backward()
    assert loss.item() == 0.0
    assert model.weight.grad.eq(0).all()


def test_a_class_that_is_ruled_out_keeps_everything_finite():
    model, ruled_out = nn.Linear(5, 3), torch.tensor([0.0, 0.0, -torch.inf])
    loss = virtual_adversarial_loss(lambda x: model(x) + ruled_out, torch.randn(4, 5))
    loss.backward()
    assert loss.item() > 0
    assert model.weight.grad.isfinite().all()


def test_under_autocast_the_direction_is_that_of_single_precision():
    """In bfloat16 the finite difference is rounding error."""
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
    inputs, found = torch.randn(8, 16), []
    for enabled in (False, True):
        seen = []
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = virtual_adversarial_loss(spied(model, seen), inputs)
        found.append((loss, seen[-1]))
    torch.testing.assert_close(*found, rtol=0, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = inputs.bfloat16()
        virtual_adversarial_loss(spied(model, seen), half)
    assert seen[-1].dtype == torch.float32


def test_valid_must_fit_the_predictions():
    with pytest.raises(ValueError, match=r"`valid` must have shape \(samples, positions...\) of the logits = \(2,\)"):
        virtual_adversarial_loss(nn.Linear(5, 3), torch.randn(2, 5), valid=torch.ones(2, 5))
