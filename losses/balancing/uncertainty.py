"""Learn the weight of each loss as the precision of its task."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from losses._checks import accumulation_dtype, check_shape
from losses.balancing._base import Losses, LossWeighting, loss_vector

__all__ = ["UncertaintyWeighting", "uncertainty_weighted_loss"]

_LOWEST = -20.0  # a loss that stays at zero pulls its log-variance down for ever: exp(20) is still finite


def uncertainty_weighted_loss(
    losses: Losses, log_variance: Tensor, classification: bool | Sequence[bool] | Tensor = True
) -> Tensor:
    r"""Weigh each loss by the precision of its task, and charge for the uncertainty claimed.

    .. math::
        L = \sum_k c_k \, e^{-s_k} L_k + \tfrac{1}{2} s_k, \qquad s_k = \log \sigma_k^2, \qquad
        c_k = \tfrac{1}{2} \text{ (regression)}, \; 1 \text{ (classification)}

    Learn ``s`` with the network. Its best value is :math:`\log(2 c_k L_k)`: a task weighs as much as the inverse of its
    loss, so the units of the losses cancel. The same learning rate serves; **no weight decay on** ``s``, which would
    pull every weight to :math:`c_k`. A term that the network can make small gets a weight without bound, and one that
    it cannot is shrunk: never weigh a penalty this way. The total may be negative. Costs nothing.

    Tasks count as classifications unless told otherwise; then all weights start at one.

    Args:
        losses: Losses of the tasks, not negative.
        log_variance: Logarithm of the variance of each task; zero at the start. Held at -20 from below.
        classification: ``False`` for a squared error, ``True`` for a cross entropy, for all tasks or by task.

    Shape:
        - losses: ``(tasks,)``, or scalars
        - log_variance, classification: ``(tasks,)``
        - output: scalar

    Raises:
        ValueError: If a shape does not fit.
        TypeError: If a loss is no tensor.

    Example:
        >>> import torch
        >>> log_variance = torch.zeros(2, requires_grad=True)
        >>> loss = uncertainty_weighted_loss(torch.tensor([1.0, 4.0]), log_variance)
        >>> loss
        tensor(5., grad_fn=<SumBackward0>)
        >>> loss.backward()
        >>> log_variance.grad
        tensor([-0.5000, -3.5000])

    References:
        Kendall, Gal and Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and
        Semantics", CVPR 2018: equation 7 for two regressions, equation 10 for a regression and a classification.
    """
    check_shape("log_variance", log_variance, log_variance.shape[:1] or (1,), "(tasks,)")
    vector = loss_vector(losses, len(log_variance))
    spread = log_variance.to(accumulation_dtype(log_variance))
    spread = spread + (spread.clamp(min=_LOWEST) - spread).detach()  # clamped, but the gradient finds the way back
    return (_precision(spread, classification) * vector + 0.5 * spread).sum()


class UncertaintyWeighting(LossWeighting):
    r"""Weigh losses by learned precisions; see :func:`uncertainty_weighted_loss`.

    The parameter ``log_variance`` has to reach the optimizer, without weight decay::

        torch.optim.AdamW(
            [
                {"params": model.parameters()},
                {"params": weighting.parameters(), "weight_decay": 0.0},
            ]
        )

    In a distributed run it belongs inside the wrapped module, as a loss of a LightningModule does: its gradient is then
    averaged with the others.

    Args:
        num_tasks: Number of losses.
        classification: ``False`` for a squared error, ``True`` for a cross entropy, for all tasks or by task.

    Shape:
        - classification: ``(num_tasks,)``
        - forward: as :func:`uncertainty_weighted_loss`

    Raises:
        ValueError: If ``num_tasks`` is below one, or ``classification`` has another length.

    Example:
        >>> import torch
        >>> weighting = UncertaintyWeighting(2, classification=[True, False])
        >>> losses = torch.tensor([1.0, 4.0], requires_grad=True)
        >>> weighting(losses).backward()
        >>> losses.grad, weighting.weights()
        (tensor([1.0000, 0.5000]), tensor([1.0000, 0.5000]))
    """

    classification: Tensor

    def __init__(self, num_tasks: int, *, classification: bool | Sequence[bool] = True) -> None:
        super().__init__(num_tasks)
        del self.weight  # follows from the parameter
        kinds = torch.as_tensor(classification, dtype=torch.bool)
        if tuple(kinds.shape) not in {(), (num_tasks,)}:
            raise ValueError(f"`classification` must be one value or {num_tasks}, got {classification}.")
        self.register_buffer("classification", kinds.expand(num_tasks).clone(), persistent=False)
        self.log_variance = nn.Parameter(torch.zeros(num_tasks))

    def forward(self, losses: Losses) -> Tensor:
        """Return the total of the ``losses``."""
        return uncertainty_weighted_loss(losses, self.log_variance, self.classification)

    def weights(self) -> Tensor:
        """Return the factors before the losses as the parameter now has them, ``(tasks,)``."""
        return _precision(self.log_variance.detach().float().clamp(min=_LOWEST), self.classification)

    def extra_repr(self) -> str:
        """Show how to build the weighting again."""
        return f"{self.num_tasks}, classification={self.classification.tolist()}"


def _precision(log_variance: Tensor, classification: bool | Sequence[bool] | Tensor) -> Tensor:
    kinds = torch.as_tensor(classification, dtype=torch.bool, device=log_variance.device)
    return torch.where(kinds, 1.0, 0.5) * torch.exp(-log_variance)
