"""Adversarial training that learns from every ascent step, not from the last one alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from losses._checks import accumulation_dtype, at_least, in_range
from losses.adversarial._ascent import ascent_gradient, per_sample, project, unit
from losses.adversarial._inputs import Forward, allowed_entries, check_loss

__all__ = ["FreeLB", "freelb_loss"]


def freelb_loss(
    forward_loss: Forward,
    inputs: Tensor,
    *,
    epsilon: float = 0.4,
    step_size: float = 0.1,
    steps: int = 3,
    start_size: float = 0.3,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Average the losses along an ascent that starts at a random point.

    .. math::
        L = \frac{1}{K} \sum_{t=0}^{K-1} L(x + \delta_t), \qquad
        \delta_0 = \Pi_{\lVert \delta \rVert_2 \le \epsilon} \left( \frac{s}{\sqrt{n}} u \right), \quad
        u \sim \mathcal{U}(-1, 1), \qquad
        \delta_{t+1} = \Pi_{\lVert \delta \rVert_2 \le \epsilon} \left(
            \delta_t + \alpha \frac{g_t}{\lVert g_t \rVert_2} \right)

    with ``n`` the number of entries of a sample that may change, so that the start has the same length in short and
    long texts, about :math:`s / \sqrt{3}`, and norms over the whole of a sample. It replaces the clean loss and trains
    as if the batch were ``K`` times as large. The published code accumulates the gradient of one step after the other;
    here one backward gives the same sum, at ``K`` forwards, ``K - 1`` backwards to the inputs, and the memory of ``K``
    graphs.

    Every forward draws the random numbers (dropout masks) that the first one drew, and what is drawn afterwards is what
    one forward would have left. Modules stay in their mode; batch normalisation in training mode counts each forward as
    a batch.

    Args:
        forward_loss: Returns the loss of perturbed inputs, a scalar.
        inputs: Clean inputs, floating; the loss trains what they were computed from.
        epsilon: Largest Euclidean length of a sample's perturbation, in units of the inputs.
        step_size: Euclidean length of a step.
        steps: Number of losses to average, :math:`K`; 1 is training with random noise.
        start_size: Scale :math:`s` of the random start; 0 starts at the clean inputs.
        mask: ``True`` where the inputs may change; ``None`` allows every entry. Leave out padding.

    Shape:
        - inputs: ``(samples, ...)``
        - mask: the shape of ``inputs``, or that without the feature or channel axis, as in
          :func:`losses.pgd_perturbation`
        - output: scalar

    Raises:
        ValueError: If an argument is out of its range, ``mask`` does not fit, or the loss is not a scalar or does not
            depend on its argument.
        TypeError: If ``inputs`` are not floating, or the loss or ``mask`` is no tensor.
        RuntimeError: In ``torch.inference_mode``.

    Example:
        >>> import torch
        >>> weight = torch.tensor([3.0, -4.0], requires_grad=True)
        >>> loss = freelb_loss(lambda x: (x @ weight).sum(), torch.zeros(1, 2), start_size=0)
        >>> loss.backward()
        >>> loss, weight.grad
        (tensor(0.5000, grad_fn=<MeanBackward0>), tensor([ 0.0600, -0.0800]))

    References:
        Zhu et al., "FreeLB: Enhanced Adversarial Training for Natural Language Understanding", ICLR 2020, Algorithm 1.
    """
    _check_settings(epsilon, step_size, steps, start_size)
    allowed = allowed_entries(inputs, mask)
    perturbation = project(_random_start(inputs, allowed, start_size), epsilon, "l2")
    losses = []
    for _ in range(steps - 1):
        keep = torch.is_grad_enabled()
        loss, gradient = ascent_gradient(forward_loss, inputs, perturbation, allowed, keep_graph=keep)
        losses.append(loss)
        perturbation = project(perturbation + step_size * unit(gradient), epsilon, "l2")
    losses.append(check_loss(forward_loss(inputs + perturbation.to(inputs.dtype))))
    return torch.stack(losses).mean()


class FreeLB(nn.Module):
    """Loss averaged along an ascent from a random start; see :func:`freelb_loss`.

    Call it in the training step with a closure, in place of the clean loss.

    Args:
        epsilon: Largest Euclidean length of a sample's perturbation, in units of the inputs.
        step_size: Euclidean length of a step.
        steps: Number of losses to average.
        start_size: Scale of the random start; 0 starts at the clean inputs.

    Shape:
        - forward: as :func:`freelb_loss`

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> model, embeddings, target = torch.nn.Linear(4, 2), torch.randn(3, 5, 4), torch.tensor([0, 1, 1])
        >>> def criterion(embeddings):
        ...     return torch.nn.functional.cross_entropy(model(embeddings.mean(dim=1)), target)
        >>> loss = FreeLB(steps=2)(criterion, embeddings)
        >>> loss.backward()
        >>> bool(model.weight.grad.ne(0).any())
        True
    """

    def __init__(self, epsilon: float = 0.4, step_size: float = 0.1, steps: int = 3, start_size: float = 0.3) -> None:
        super().__init__()
        _check_settings(epsilon, step_size, steps, start_size)
        self.epsilon = epsilon
        self.step_size = step_size
        self.steps = steps
        self.start_size = start_size

    def forward(self, forward_loss: Forward, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the mean of ``forward_loss`` over the perturbed ``inputs`` of all steps."""
        return freelb_loss(
            forward_loss,
            inputs,
            epsilon=self.epsilon,
            step_size=self.step_size,
            steps=self.steps,
            start_size=self.start_size,
            mask=mask,
        )

    def extra_repr(self) -> str:
        """Show how to build the module again."""
        sizes = f"epsilon={self.epsilon}, step_size={self.step_size}"
        return f"{sizes}, steps={self.steps}, start_size={self.start_size}"


def _check_settings(epsilon: float, step_size: float, steps: int, start_size: float) -> None:
    in_range("epsilon", epsilon, 0)
    in_range("step_size", step_size, 0)
    at_least("steps", steps, 1)
    in_range("start_size", start_size, 0)


def _random_start(inputs: Tensor, allowed: Tensor, size: float) -> Tensor:
    start = torch.empty(inputs.shape, dtype=accumulation_dtype(inputs), device=inputs.device).uniform_(-1, 1)
    entries = allowed.flatten(1).sum(dim=1).clamp(min=1).to(start.dtype)
    return torch.where(allowed, start * per_sample(size / entries.sqrt(), start), 0.0)
