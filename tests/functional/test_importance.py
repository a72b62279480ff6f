"""Gate gradients against gates that were really there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attn_callbacks.functional.importance import gate_gradient

QUERY, KEY, VALUE = torch.randn(3, 4, 3, 6, 5, dtype=torch.float64, requires_grad=True)
READ = torch.randn(4, 3, 6, 5, dtype=torch.float64)


def attend(gates: Tensor | None = None, kept: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, output and the loss of each of four examples; ``gates`` are ``(batch, heads)``."""
    weights = (QUERY @ KEY.mT).softmax(dim=-1)
    output = (weights if kept is None else weights * kept) @ VALUE
    gated = output if gates is None else output * gates[..., None, None]
    return weights, output, ((gated * READ).sum(dim=1).tanh() ** 2).sum(dim=(1, 2))


def expected(kept: Tensor | None = None) -> Tensor:
    """One example after the other, as if there were no other."""
    gates = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
    losses = attend(gates, kept)[2]
    return torch.stack([torch.autograd.grad(losses[n], gates, retain_graph=True)[0][n] for n in range(4)])


@pytest.mark.parametrize("dropout", [False, True])
def test_equals_explicit_gates_at_output_and_weights(dropout: bool) -> None:
    kept = (torch.rand(4, 3, 6, 6) > 0.3) / 0.7 if dropout else None
    weights, output, losses = attend(kept=kept)
    at_weights, at_output = torch.autograd.grad(losses.sum(), (weights, output))
    torch.testing.assert_close(gate_gradient(output, at_output), expected(kept), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gate_gradient(weights, at_weights), expected(kept), rtol=1e-9, atol=1e-12)


def test_predicts_what_the_loss_loses_with_a_head() -> None:
    """Its negative is the change of the loss to first order: for a loss linear in the heads it is the change itself."""
    output = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    read = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    found = gate_gradient(output, *torch.autograd.grad((output * read).sum(), output))
    for head in range(3):
        without = output.detach().clone()
        without[:, head] = 0.0
        change = ((without - output) * read).sum(dim=(1, 2, 3))
        torch.testing.assert_close(-found[:, head], change)


def test_a_head_that_nobody_reads_has_none() -> None:
    read = READ.clone()
    read[:, 1] = 0.0
    _, output, _ = attend()
    gradient = torch.autograd.grad((output * read).square().sum(), output)[0]
    found = gate_gradient(output, gradient)
    assert (found[:, 1] == 0).all()
    assert (found[:, [0, 2]] != 0).all()


def test_all_heads_together_are_the_scale_of_the_output() -> None:
    """A gate shared by all heads has the sum of their gradients, which a homogeneous loss gives as its degree."""
    output = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    loss = (output**3).sum(dim=(1, 2, 3))
    found = gate_gradient(output, *torch.autograd.grad(loss.sum(), output))
    torch.testing.assert_close(found.sum(dim=1), 3 * loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_single(dtype: torch.dtype) -> None:
    output, gradient = torch.full((1, 1, 64, 64), 2.0, dtype=dtype), torch.full((1, 1, 64, 64), 100.0, dtype=dtype)
    found = gate_gradient(output, gradient)
    assert found.dtype == torch.float32
    assert found.item() == 64 * 64 * 200  # beyond float16


def test_stays_differentiable() -> None:
    def gate(output: Tensor) -> Tensor:
        return gate_gradient(output, *torch.autograd.grad(output.pow(3).sum(), output, create_graph=True))

    assert torch.autograd.gradcheck(gate, torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("shapes", [((2, 3, 4, 5), (2, 3, 5, 4)), ((3,), (3,))])
def test_shapes_that_do_not_fit_are_refused(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match="must have one shape"):
        gate_gradient(*map(torch.ones, shapes))
