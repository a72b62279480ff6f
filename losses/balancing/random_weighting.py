"""Weigh losses at random: what a method for balancing them has to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from losses._checks import at_least
from losses.balancing._base import Losses, LossWeighting, loss_vector, weighted_sum

__all__ = ["RandomLossWeighting", "random_loss_weights"]

_PERIOD = 2**16  # draws until they repeat


def random_loss_weights(scores: Tensor) -> Tensor:
    r"""Return the weights that standard normal scores stand for.

    .. math::
        w_k = K \, \frac{e^{z_k}}{\sum_i e^{z_i}}, \qquad z_k \sim \mathcal{N}(0, 1)

    The published weights sum to one; these sum to the number of tasks, as those of the other methods do, so that a
    comparison changes the weights only, and not the step size or the share of terms outside.

    Args:
        scores: Random numbers, one for each loss.

    Shape:
        - scores: ``(tasks,)``
        - output: ``(tasks,)``, summing to ``tasks``

    Example:
        >>> import torch
        >>> loss = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> (random_loss_weights(torch.tensor([0.0, 1.0])) * loss).sum().backward()
        >>> loss.grad
        tensor([0.5379, 1.4621])

    References:
        Lin et al., "Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task Learning", TMLR 2022.
    """
    return len(scores) * scores.softmax(dim=0)


class RandomLossWeighting(LossWeighting):
    """Weigh losses at random, anew at every call; see :func:`random_loss_weights`. The control for all the others.

    In training mode, with gradients on, every call draws; otherwise all weights are one, their mean. Draws depend on
    the seed and on the number of those calls, which the state dict carries: a run resumes exactly, every process draws
    the same, and nothing else that draws random numbers is disturbed. Keep it outside activation checkpointing: a
    forward pass that runs again would draw other weights. All draws lie in a table on the module's device, 65536 to a
    task, 0.26 MB; then they repeat.

    Args:
        num_tasks: Number of losses.
        seed: Picks the table of draws.

    Shape:
        - forward: ``(num_tasks,)`` or scalars to a scalar

    Raises:
        ValueError: If ``num_tasks`` is below one, or ``seed`` below zero.

    Example:
        >>> import torch
        >>> weighting = RandomLossWeighting(2, seed=1)
        >>> losses = torch.tensor([1.0, 4.0], requires_grad=True)
        >>> weighting(losses).backward()
        >>> torch.equal(losses.grad, weighting.weights())
        True
    """

    draws: Tensor
    scores: Tensor

    def __init__(self, num_tasks: int, *, seed: int = 0) -> None:
        super().__init__(num_tasks)
        self.seed = at_least("seed", seed, 0)
        self.register_buffer("draws", torch.zeros((), dtype=torch.long))
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("scores", torch.randn(_PERIOD, num_tasks, generator=generator), persistent=False)

    def forward(self, losses: Losses) -> Tensor:
        """Return the weighted sum of the losses; in training, with new weights."""
        vector = loss_vector(losses, self.num_tasks)
        if not self.learning:
            return vector.sum()
        weight = random_loss_weights(self.scores.index_select(0, self.draws.reshape(1) % _PERIOD)[0])
        self.weight.copy_(weight)
        self.draws.add_(1)
        return weighted_sum(vector, weight)

    def extra_repr(self) -> str:
        """Show how to build the weighting again."""
        return f"{self.num_tasks}, seed={self.seed}"
