"""The fast gradient method in closed form."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from losses.adversarial import FGM, fgm_perturbation, pgd_perturbation

WEIGHT = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]])


def linear(inputs):
    return (inputs * WEIGHT).sum()


def test_on_a_linear_model_it_is_the_weight_scaled():
    inputs = torch.randn(4, 2, 3)
    expected = (0.7 * WEIGHT / WEIGHT.norm()).expand(4, 2, 3)
    torch.testing.assert_close(fgm_perturbation(linear, inputs, epsilon=0.7), expected)


def test_the_norm_is_that_of_a_whole_sample():
    """Not of a token: the first token moves by less because the gradient there is smaller."""
    length = fgm_perturbation(linear, torch.randn(1, 2, 3))[0].norm(dim=1)
    torch.testing.assert_close(length, WEIGHT.norm(dim=1) / WEIGHT.norm())


def test_the_sign_form():
    found = fgm_perturbation(linear, torch.randn(4, 2, 3), epsilon=0.1, norm="linf")
    torch.testing.assert_close(found, 0.1 * WEIGHT.sign().expand(4, 2, 3))


def test_the_length_is_all_within_the_mask():
    mask = torch.tensor([[True, False], [False, True], [True, True], [False, False]])
    found = fgm_perturbation(linear, torch.randn(4, 2, 3), epsilon=2.0, mask=mask)
    torch.testing.assert_close(found.flatten(1).norm(dim=1), torch.tensor([2.0, 2.0, 2.0, 0.0]))
    torch.testing.assert_close(found[0, 0], 2 * WEIGHT[0] / WEIGHT[0].norm())
    assert found[0, 1].eq(0).all()
    assert found[3].eq(0).all()


def test_the_loss_rises_by_epsilon_times_the_norm():
    inputs = torch.randn(4, 2, 3)
    loss = FGM(0.5)(linear, inputs)
    torch.testing.assert_close(loss, linear(inputs) + 4 * 0.5 * WEIGHT.norm())


def test_the_perturbation_is_a_constant_of_the_loss():
    weight, inputs = torch.randn(2, 3, requires_grad=True), torch.randn(4, 2, 3, requires_grad=True)

    def curved(x):
        return torch.tanh(x * weight).square().sum()

    found = fgm_perturbation(curved, inputs)
    assert not found.requires_grad
    expected = torch.autograd.grad(curved(inputs + found), [weight, inputs])
    given = torch.autograd.grad(FGM()(curved, inputs), [weight, inputs])
    for here, there in zip(given, expected, strict=True):
        torch.testing.assert_close(here, there)


def test_samples_do_not_share_a_norm():
    scale = torch.tensor([1.0, 1e-6, 1e6])[:, None]
    found = fgm_perturbation(lambda x: (x * scale).sum(), torch.zeros(3, 4))
    torch.testing.assert_close(found, torch.full((3, 4), 0.5))


def test_a_graph_outside_the_closure_stays_usable():
    encoder, inputs = torch.nn.Linear(3, 3), torch.randn(4, 3)
    hidden = torch.tanh(encoder(inputs))
    criterion = lambda x: F.mse_loss(torch.tanh(x) * hidden, torch.ones(4, 3))  # noqa: E731
    (criterion(hidden) + FGM()(criterion, hidden)).backward()
    assert encoder.weight.grad.isfinite().all()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    norm=st.sampled_from(["l2", "linf"]),
    epsilon=st.floats(0, 3),
    seed=st.integers(0, 99),
)
def test_any_shape_any_mask(shape, norm, epsilon, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs, weight = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    mask = torch.rand(shape, generator=generator) < 0.6
    found = fgm_perturbation(lambda x: (x * weight).sum(), inputs, epsilon=epsilon, norm=norm, mask=mask)
    assert found[~mask].eq(0).all()
    size = found.flatten(1).abs().amax(1) if norm == "linf" else found.flatten(1).norm(dim=1)
    torch.testing.assert_close(size, epsilon * mask.flatten(1).any(dim=1).float())
    assert (found * weight).ge(0).all()


def test_it_is_one_step_of_projected_gradient_descent():
    inputs = torch.randn(4, 2, 3)
    expected = pgd_perturbation(linear, inputs, epsilon=0.4, step_size=9.0, steps=1)
    torch.testing.assert_close(fgm_perturbation(linear, inputs, epsilon=0.4), expected)
