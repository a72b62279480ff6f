"""One step uphill: the gradient of a loss with respect to its inputs, its direction, and the way back into the ball.

Norms are taken for every sample over all its other axes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from losses._checks import accumulation_dtype
from losses.adversarial._inputs import Forward, check_loss, check_reached

__all__ = [
    "NORMS",
    "ascent_gradient",
    "gaussian",
    "peak_normalised",
    "per_sample",
    "project",
    "same_randomness",
    "steepest",
    "unit",
]

NORMS = ("l2", "linf")
_LEVEL = 2.0**8  # size of a scaled gradient where that of the loss is the loss itself
_LARGEST_SCALE = 2.0**15  # a power of two that float16 holds


def same_randomness(inputs: Tensor) -> AbstractContextManager[None]:
    """Return a context that leaves torch's random state as it was, on the CPU and on the CUDA device of ``inputs``.

    Forwards run one after the other, each in such a context, draw the same numbers; so does one that follows.
    """
    return torch.random.fork_rng(devices=[inputs.device] if inputs.is_cuda else [])


def ascent_gradient(
    forward_loss: Forward,
    inputs: Tensor,
    perturbation: Tensor,
    allowed: Tensor,
    *,
    keep_graph: bool = False,
    closure: str = "forward_loss",
) -> tuple[Tensor, Tensor]:
    """Return the loss at ``inputs + perturbation``, and its gradient there up to a positive factor.

    Gradients of parameters are neither computed nor touched, and random numbers are given back. The factor keeps the
    gradient of a half-precision graph within range, whatever the batch size and the reduction of the loss. A sample
    whose gradient is not finite all the same gets zero.

    Args:
        forward_loss: Returns the loss of perturbed inputs, a scalar.
        inputs: Clean inputs; the loss reaches what they were computed from.
        perturbation: Where to stand.
        allowed: ``True`` where the inputs may change; elsewhere the gradient is zero.
        keep_graph: Whether the loss will be differentiated again; else it comes without a graph.
        closure: What an error calls ``forward_loss``.

    Shape:
        - inputs, perturbation, allowed: ``(samples, ...)``
        - output: scalar, and the shape of ``inputs`` in at least float32
    """
    with torch.enable_grad(), same_randomness(inputs):
        point = inputs + perturbation.to(inputs.dtype)
        if not point.requires_grad:
            point.requires_grad_()
        loss = check_loss(forward_loss(point))
        check_reached(loss.requires_grad, closure)
        scale = (len(inputs) * _LEVEL / loss.detach().float().abs()).clamp(max=_LARGEST_SCALE)
        (gradient,) = torch.autograd.grad(
            loss, point, grad_outputs=scale.to(loss.dtype), retain_graph=keep_graph, allow_unused=True
        )
    check_reached(gradient is not None, closure)
    finite = gradient.isfinite().flatten(1).all(dim=1)
    gradient = torch.where(per_sample(finite, gradient) & allowed, gradient, 0.0)
    return loss if keep_graph else loss.detach(), gradient.to(accumulation_dtype(gradient))


def steepest(gradient: Tensor, norm: str) -> Tensor:
    """Return the direction of length one in ``norm`` that raises the loss most; zero where the gradient is."""
    return unit(gradient) if norm == "l2" else gradient.sign()


def unit(direction: Tensor) -> Tensor:
    """Return ``direction`` with Euclidean length one in every sample; zero stays zero."""
    direction = peak_normalised(direction)  # squares of small gradients would underflow
    return direction / per_sample(_length(direction).clamp(min=1), direction)


def peak_normalised(direction: Tensor) -> Tensor:
    """Return ``direction`` with one as the largest magnitude in every sample; zero stays zero."""
    peak = direction.abs().flatten(1).amax(dim=1).clamp(min=torch.finfo(direction.dtype).tiny)
    return direction / per_sample(peak, direction)


def project(perturbation: Tensor, epsilon: float, norm: str) -> Tensor:
    """Return the point of the ball of radius ``epsilon`` in ``norm`` that is nearest to ``perturbation``."""
    if norm == "linf":
        return perturbation.clamp(-epsilon, epsilon)
    length = _length(perturbation).clamp(min=torch.finfo(perturbation.dtype).tiny)
    return perturbation * per_sample((epsilon / length).clamp(max=1), perturbation)


def gaussian(inputs: Tensor, allowed: Tensor) -> Tensor:
    """Return standard normal noise in the shape of ``inputs``, in at least float32, zero where not ``allowed``."""
    noise = torch.randn(inputs.shape, dtype=accumulation_dtype(inputs), device=inputs.device)
    return torch.where(allowed, noise, 0.0)


def _length(direction: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(direction.flatten(1), dim=1)
    return length


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.dim() - 1))
