"""Virtual adversarial training: predictions that stay in the direction in which they would change most."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from losses._checks import REDUCTIONS, at_least, in_range, one_of
from losses.adversarial._ascent import unit
from losses.adversarial._inputs import Forward
from losses.adversarial._smoothness import kullback_leibler, smoothness_loss

__all__ = ["VirtualAdversarialLoss", "virtual_adversarial_loss"]


def virtual_adversarial_loss(
    forward_logits: Forward,
    inputs: Tensor,
    *,
    epsilon: float = 1.0,
    xi: float = 0.1,
    steps: int = 1,
    mask: Tensor | None = None,
    valid: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Penalise how far predictions move in the direction in which they move most.

    .. math::
        L = \operatorname{KL} \left( p(x) \,\Vert\, p(x + \epsilon d) \right), \qquad
        d \leftarrow \frac{g}{\lVert g \rVert_2}, \quad
        g = \nabla_r \operatorname{KL} \left( p(x) \,\Vert\, p(x + r) \right) \Big|_{r = \xi d}

    from a random unit vector ``d``, with norms over the whole of a sample. Each of the ``steps`` is one power iteration
    for the top eigenvector of the Hessian of the divergence. The clean prediction is a constant. It needs no label, so
    unlabelled samples count too. Costs ``steps + 2`` forwards, ``steps`` backwards to the inputs.

    ``xi`` is the step of a finite difference: with 1e-6, as published, float32 rounding decides the direction (cosine
    with the exact one below zero, above .99 from 1e-3 to 1 for a small transformer on inputs of unit size); choose it
    well below the size of the inputs. In half precision no such step exists below 1, so under autocast the closure runs
    in float32; open an autocast inside the closure to change that.

    Every forward draws the random numbers (dropout masks) that the first one drew, and what is drawn afterwards is what
    one forward would have left. Modules stay in their mode; batch normalisation in training mode counts each forward as
    a batch.

    Args:
        forward_logits: Returns the logits of perturbed inputs, classes on axis 1.
        inputs: Clean inputs, floating; the loss trains what they were computed from.
        epsilon: Euclidean length of a sample's perturbation, in units of the inputs.
        xi: Euclidean length at which the direction is measured.
        steps: Number of power iterations.
        mask: ``True`` where the inputs may change; ``None`` allows every entry. A sample with an empty mask contributes
            nothing and leaves the mean. Leave out padding.
        valid: ``True`` for predictions that count, such as those of real tokens; ``None`` takes all.
        reduction: ``"mean"`` over the predictions that count, ``"sum"`` or ``"none"``.

    Shape:
        - inputs: ``(samples, ...)``
        - logits: ``(samples, classes)`` or ``(samples, classes, positions...)``
        - mask: the shape of ``inputs``, or that without the feature or channel axis, as in
          :func:`losses.pgd_perturbation`
        - valid: ``(samples, positions...)``, ``(samples,)`` where the logits have no positions
        - output: scalar, or ``(samples, positions...)`` for ``reduction="none"``; in nats

    Raises:
        ValueError: If an argument is out of its range, a shape does not fit, there is one class only, or the logits do
            not depend on the closure's argument.
        TypeError: If ``inputs`` are not floating, or the logits or ``mask`` are no tensor.
        RuntimeError: In ``torch.inference_mode``.

    Example:
        >>> import torch
        >>> weight = torch.tensor([[1.0, -1.0], [0.0, 0.0]], requires_grad=True)
        >>> loss = virtual_adversarial_loss(lambda x: x @ weight, torch.zeros(1, 2))
        >>> loss
        tensor(0.4338, grad_fn=<DivBackward0>)
        >>> loss.backward()
        >>> weight.grad
        tensor([[ 0.3808, -0.3808],
                [ 0.0000,  0.0000]])

    References:
        Miyato et al., "Virtual Adversarial Training: A Regularization Method for Supervised and Semi-Supervised
        Learning", IEEE TPAMI 2018.
    """
    _check_settings(epsilon, xi, steps, reduction)

    def power_iteration(noise: Tensor, gradient: Callable[[Tensor], Tensor]) -> Tensor:
        direction = unit(noise)
        for _ in range(steps):
            direction = unit(gradient(xi * direction))
        return epsilon * direction

    return smoothness_loss(
        forward_logits, inputs, power_iteration, kullback_leibler, mask=mask, valid=valid, reduction=reduction
    )


class VirtualAdversarialLoss(nn.Module):
    """How far predictions move in their most sensitive direction; see :func:`virtual_adversarial_loss`.

    Call it in the training step with a closure, and add the result to the clean loss.

    Args:
        epsilon: Euclidean length of a sample's perturbation, in units of the inputs.
        xi: Euclidean length at which the direction is measured.
        steps: Number of power iterations.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Shape:
        - forward: as :func:`virtual_adversarial_loss`

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> model, unlabelled = torch.nn.Linear(4, 3), torch.randn(8, 4)
        >>> loss = VirtualAdversarialLoss(epsilon=2.0)(model, unlabelled)
        >>> loss.backward()
        >>> bool(model.weight.grad.ne(0).any())
        True
    """

    def __init__(self, epsilon: float = 1.0, xi: float = 0.1, steps: int = 1, reduction: str = "mean") -> None:
        super().__init__()
        _check_settings(epsilon, xi, steps, reduction)
        self.epsilon = epsilon
        self.xi = xi
        self.steps = steps
        self.reduction = reduction

    def forward(
        self,
        forward_logits: Forward,
        inputs: Tensor,
        mask: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of the predictions ``forward_logits`` around ``inputs``."""
        return virtual_adversarial_loss(
            forward_logits,
            inputs,
            epsilon=self.epsilon,
            xi=self.xi,
            steps=self.steps,
            mask=mask,
            valid=valid,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """Show how to build the loss again."""
        return f"epsilon={self.epsilon}, xi={self.xi}, steps={self.steps}, reduction={self.reduction!r}"


def _check_settings(epsilon: float, xi: float, steps: int, reduction: str) -> None:
    in_range("epsilon", epsilon, 0)
    in_range("xi", xi, 0)
    at_least("steps", steps, 1)
    one_of("reduction", reduction, REDUCTIONS)
