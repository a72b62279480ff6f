"""SMART: predictions that stay the same, in both directions of the divergence, in a small box around the inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from losses._checks import REDUCTIONS, at_least, in_range, one_of
from losses.adversarial._ascent import peak_normalised, project
from losses.adversarial._inputs import Forward
from losses.adversarial._smoothness import smoothness_loss, symmetric_kullback_leibler

__all__ = ["SMARTLoss", "smart_loss"]


def smart_loss(
    forward_logits: Forward,
    inputs: Tensor,
    *,
    epsilon: float = 0.1,
    step_size: float = 0.1,
    steps: int = 1,
    noise: float = 1e-5,
    mask: Tensor | None = None,
    valid: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Penalise how far predictions move, measured symmetrically, at the worst place of a box around the inputs.

    .. math::
        L = D(x + \delta), \quad
        D(z) = \operatorname{KL}(p(z) \,\Vert\, p(x)) + \operatorname{KL}(p(x) \,\Vert\, p(z)), \qquad
        \delta \leftarrow \Pi_{\lVert \delta \rVert_\infty \le \epsilon} \left(
            \delta + \eta \frac{g}{\lVert g \rVert_\infty} \right), \quad g = \nabla_\delta D(x + \delta)

    from :math:`\delta \sim \mathcal{N}(0, \sigma^2)`, with norms over the whole of a sample. Clean and perturbed
    predictions both get a gradient. It is the smoothness-inducing regulariser of the paper, without its proximal term.
    Costs ``steps + 2`` forwards, of which two are kept for the backward, and ``steps`` backwards to the inputs.

    The loss grows with the square of ``epsilon``: take about a tenth of the typical size of an entry, so less than the
    default for word embeddings that are not normalised. The default gives around 0.01 nats for a small transformer on
    inputs of unit size, the order at which the published coefficients of 1 to 5 say something. Paper and published code
    differ here. The paper has a box of 1e-5 and a step of 1e-3, which leaves nothing to penalise (below 1e-8 nats). The
    code has no box, and its 1e-6 called epsilon only guards a division: it adds a thousandth of the gradient, of
    whatever size, to the noise, and divides the sum by its largest entry in each token, which then is one. There the
    noise outweighs the gradient, so the change is large and almost random. This loss takes the ascent from the paper,
    and a box in which its size is about that of the code.

    Random noise of 1e-5 is less than half precision holds, so under autocast the closure runs in float32, and inputs in
    half precision start with noise of the size that they can hold.

    Every forward draws the random numbers (dropout masks) that the first one drew, and what is drawn afterwards is what
    one forward would have left. Modules stay in their mode; batch normalisation in training mode counts each forward as
    a batch.

    Args:
        forward_logits: Returns the logits of perturbed inputs, classes on axis 1.
        inputs: Clean inputs, floating; the loss trains what they were computed from.
        epsilon: Largest change of an entry, in units of the inputs.
        step_size: Largest change of an entry in one step, :math:`\eta`; below ``epsilon`` for several steps.
        steps: Number of steps.
        noise: Standard deviation of the start, :math:`\sigma`; at zero the gradient would be zero.
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
        >>> loss = smart_loss(lambda x: x @ weight, torch.zeros(1, 2), epsilon=1.0, step_size=1.0)
        >>> loss
        tensor(0.7616, grad_fn=<DivBackward0>)
        >>> loss.backward()
        >>> weight.grad[0]
        tensor([ 0.5908, -0.5908])

    References:
        Jiang et al., "SMART: Robust and Efficient Fine-Tuning for Pre-trained Natural Language Models through
        Principled Regularized Optimization", ACL 2020, Algorithm 1 (ascent).
    """
    _check_settings(epsilon, step_size, steps, noise, reduction)

    def projected_ascent(start: Tensor, gradient: Callable[[Tensor], Tensor]) -> Tensor:
        perturbation = start * (max(noise, 2 * torch.finfo(inputs.dtype).eps) if noise > 0 else 0.0)
        for _ in range(steps):
            step = step_size * peak_normalised(gradient(perturbation))
            perturbation = project(perturbation + step, epsilon, "linf")
        return perturbation

    return smoothness_loss(
        forward_logits,
        inputs,
        projected_ascent,
        symmetric_kullback_leibler,
        mask=mask,
        valid=valid,
        reduction=reduction,
    )


class SMARTLoss(nn.Module):
    """Symmetric divergence of predictions in a small box around the inputs; see :func:`smart_loss`.

    Call it in the training step with a closure, and add the result to the clean loss.

    Args:
        epsilon: Largest change of an entry, in units of the inputs.
        step_size: Largest change of an entry in one step.
        steps: Number of steps.
        noise: Standard deviation of the start.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Shape:
        - forward: as :func:`smart_loss`

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> model, embeddings = torch.nn.Linear(4, 3), torch.randn(8, 5, 4)
        >>> loss = SMARTLoss()(lambda embeddings: model(embeddings.mean(dim=1)), embeddings)
        >>> loss.backward()
        >>> bool(model.weight.grad.ne(0).any())
        True
    """

    def __init__(
        self,
        epsilon: float = 0.1,
        step_size: float = 0.1,
        steps: int = 1,
        noise: float = 1e-5,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        _check_settings(epsilon, step_size, steps, noise, reduction)
        self.epsilon = epsilon
        self.step_size = step_size
        self.steps = steps
        self.noise = noise
        self.reduction = reduction

    def forward(
        self,
        forward_logits: Forward,
        inputs: Tensor,
        mask: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of the predictions ``forward_logits`` around ``inputs``."""
        return smart_loss(
            forward_logits,
            inputs,
            epsilon=self.epsilon,
            step_size=self.step_size,
            steps=self.steps,
            noise=self.noise,
            mask=mask,
            valid=valid,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """Show how to build the loss again."""
        sizes = f"epsilon={self.epsilon}, step_size={self.step_size}, steps={self.steps}, noise={self.noise}"
        return f"{sizes}, reduction={self.reduction!r}"


def _check_settings(epsilon: float, step_size: float, steps: int, noise: float, reduction: str) -> None:
    in_range("epsilon", epsilon, 0)
    in_range("step_size", step_size, 0)
    at_least("steps", steps, 1)
    in_range("noise", noise, 0)
    one_of("reduction", reduction, REDUCTIONS)
