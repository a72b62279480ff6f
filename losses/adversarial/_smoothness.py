"""What the smoothness losses share: predictions of clean and perturbed inputs, and how far apart they are.

Their differences are far smaller than what half precision can hold, so under autocast the closure runs in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from losses._checks import REDUCTIONS, accumulation_dtype, check_shape, one_of
from losses.adversarial._ascent import ascent_gradient, gaussian, same_randomness
from losses.adversarial._inputs import Forward, allowed_entries, check_logits
from losses.classification._per_sample import reduce

__all__ = ["Climb", "kullback_leibler", "smoothness_loss", "symmetric_kullback_leibler"]

Divergence = Callable[[Tensor, Tensor], Tensor]
Climb = Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]
_SMALLEST_SCORE = -1e4  # of a class that a logit of -inf rules out: its exp is zero, its differences are finite


def smoothness_loss(
    forward_logits: Forward,
    inputs: Tensor,
    climb: Climb,
    divergence: Divergence,
    *,
    mask: Tensor | None,
    valid: Tensor | None,
    reduction: str,
) -> Tensor:
    """Return how far predictions move at the perturbation that ``climb`` finds.

    Args:
        forward_logits: Returns the logits of perturbed inputs.
        inputs: Clean inputs.
        climb: Returns the perturbation, given standard normal noise (zero where nothing may change) and a function that
            returns the gradient of the summed divergence at a perturbation.
        divergence: Of the log-probabilities of clean and perturbed inputs, over classes on axis 1.
        mask: ``True`` where the inputs may change.
        valid: ``True`` for predictions that count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
    """
    one_of("reduction", reduction, REDUCTIONS)
    allowed = allowed_entries(inputs, mask)
    with _single_precision(inputs) as single:
        noise = gaussian(single, allowed)  # before the first forward, whose random numbers all the others repeat
        with same_randomness(inputs):  # no `no_grad`: autocast would keep weights cast without one (pytorch#112583)
            clean = _scores(forward_logits, single)
        counted = _counted(clean, allowed, valid)

        def total(point: Tensor) -> Tensor:
            return torch.where(counted, divergence(clean, _scores(forward_logits, point)), 0.0).sum()

        def gradient(perturbation: Tensor) -> Tensor:
            return ascent_gradient(total, single, perturbation, allowed, closure="forward_logits")[1]

        perturbation = climb(noise, gradient).to(single.dtype)
        moved = divergence(clean, _scores(forward_logits, single + perturbation))
        return reduce(torch.where(counted, moved, 0.0), None, counted, reduction)


def kullback_leibler(reference: Tensor, other: Tensor) -> Tensor:
    """Return the divergence of ``other`` from ``reference``, which is a constant here, both log-probabilities."""
    reference = reference.detach()
    return (reference.exp() * (reference - other)).sum(dim=1)


def symmetric_kullback_leibler(one: Tensor, other: Tensor) -> Tensor:
    """Return the sum of the divergences in both directions of log-probabilities."""
    return ((one.exp() - other.exp()) * (one - other)).sum(dim=1)


@contextmanager
def _single_precision(inputs: Tensor) -> Iterator[Tensor]:
    """Turn autocast off, and yield the inputs in float32 if it was on."""
    kind = inputs.device.type
    single = inputs.to(accumulation_dtype(inputs)) if torch.is_autocast_enabled(kind) else inputs
    with torch.autocast(kind, enabled=False):
        yield single


def _scores(forward_logits: Forward, inputs: Tensor) -> Tensor:
    """Return finite log-probabilities in at least float32, ``(samples, classes, positions...)``."""
    logits = check_logits(forward_logits(inputs), len(inputs))
    return F.log_softmax(logits, dim=1, dtype=accumulation_dtype(logits)).clamp(min=_SMALLEST_SCORE)


def _counted(clean: Tensor, allowed: Tensor, valid: Tensor | None) -> Tensor:
    """Return which predictions count, ``(samples, positions...)``: valid, of samples that may change anywhere."""
    shape = (clean.shape[0], *clean.shape[2:])
    counted = allowed.flatten(1).any(dim=1).reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
    if valid is None:
        return counted
    check_shape("valid", valid, shape, "(samples, positions...) of the logits")
    return counted & (valid != 0)
