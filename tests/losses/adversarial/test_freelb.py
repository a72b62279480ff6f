"""FreeLB against the published loop: one backward a step, gradients accumulated."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from losses.adversarial import FreeLB, freelb_loss

TARGET = torch.tensor([0, 2, 1, 1])


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.inner, self.outer = nn.Linear(6, 16), nn.Linear(16, 3)

    def criterion(self, embeddings):
        hidden = F.dropout(torch.tanh(self.inner(embeddings.mean(dim=1))), 0.5)
        return F.cross_entropy(self.outer(hidden), TARGET)


def published_loop(model, tokens, start, state, steps, step_size, epsilon, mask):
    """Accumulate K gradients, each with the same dropout mask, and return the mean loss."""
    delta, total = start.clone(), 0.0
    for step in range(steps):
        torch.set_rng_state(state)
        delta = delta.detach().requires_grad_()
        loss = model.criterion(model.embedding(tokens) + delta) / steps
        loss.backward()
        total += loss.item()
        if step == steps - 1:
            return total
        for sample in range(len(tokens)):
            gradient = delta.grad[sample] * mask[sample][:, None]
            moved = delta[sample].detach() + step_size * gradient / gradient.norm().clamp(min=1e-30)
            delta.data[sample] = moved * min(1.0, epsilon / max(moved.norm().item(), 1e-30))
    return total


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("epsilon", [0.2, 5.0])
def test_one_backward_equals_the_accumulated_gradients(steps, epsilon):
    model, tokens = Classifier(), torch.randint(10, (4, 5))
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[0, 2:], mask[3] = False, False
    first = {}

    def spied(embeddings):
        first.setdefault("inputs", embeddings.detach().clone())
        first.setdefault("state", torch.get_rng_state())
        return model.criterion(embeddings)

    inputs = model.embedding(tokens)
    loss = freelb_loss(spied, inputs, steps=steps, epsilon=epsilon, mask=mask)
    loss.backward()
    ours = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    start = first["inputs"] - inputs.detach()
    expected = published_loop(model, tokens, start, first["state"], steps, 0.1, epsilon, mask)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    for here, weight in zip(ours, model.parameters(), strict=True):
        torch.testing.assert_close(here, weight.grad, rtol=1e-4, atol=1e-6)


def test_the_start_has_the_same_length_whatever_the_length_of_the_text():
    seen, mask = [], torch.ones(3, 1000, dtype=torch.bool)
    mask[1, 10:], mask[2] = False, False
    spy = lambda x: (seen.append(x.detach()), x.sum())[1]  # noqa: E731
    freelb_loss(spy, torch.zeros(3, 1000, 50), epsilon=1.0, start_size=0.6, mask=mask)
    start = seen[0]
    torch.testing.assert_close(start.flatten(1).norm(dim=1), torch.tensor([0.6, 0.6, 0.0]) / 3**0.5, rtol=0.05, atol=0)
    assert start[0].abs().max() <= 0.6 / (1000 * 50) ** 0.5
    assert start[1].abs().max() <= 0.6 / (10 * 50) ** 0.5
    assert start[1, 10:].eq(0).all()


def test_the_ascent_stays_within_the_ball():
    seen, weight = [], torch.randn(5, 6)
    inputs = torch.zeros(3, 5, 6)
    freelb_loss(lambda x: (seen.append(x.detach()), (x * weight).sum())[1], inputs, epsilon=0.25, steps=6)
    lengths = torch.stack([x.flatten(1).norm(dim=1) for x in seen])
    assert (lengths <= 0.25 * (1 + 1e-5)).all()
    torch.testing.assert_close(lengths[-1], torch.full((3,), 0.25))


def test_the_start_is_within_the_ball_as_well():
    seen = []
    inputs, spy = torch.zeros(3, 5, 6), lambda x: (seen.append(x.detach()), x.sum())[1]
    freelb_loss(spy, inputs, epsilon=0.05, start_size=0.3, steps=2)
    lengths = torch.stack([x.flatten(1).norm(dim=1) for x in seen])
    assert (lengths <= 0.05 * (1 + 1e-5)).all()
    torch.testing.assert_close(lengths[0], torch.full((3,), 0.05))


def test_the_loss_of_a_linear_model_rises():
    model, inputs = nn.Linear(6, 3), torch.randn(4, 6)
    criterion = lambda x: F.cross_entropy(model(x), TARGET)  # noqa: E731
    assert FreeLB(start_size=0)(criterion, inputs) > criterion(inputs)


def test_without_ascent_it_is_the_clean_loss():
    model, inputs = nn.Linear(6, 3), torch.randn(4, 6)
    criterion = lambda x: F.cross_entropy(model(x), TARGET)  # noqa: E731
    for still in (FreeLB(start_size=0, steps=1), FreeLB(start_size=0, step_size=0), FreeLB(start_size=0, epsilon=0)):
        torch.testing.assert_close(still(criterion, inputs), criterion(inputs))
