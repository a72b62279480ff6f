"""What all loss weightings share: losses in, as a vector or one by one, their weighted sum out, weights for a log."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from losses._checks import accumulation_dtype, at_least, check_shape
from losses._state import StatefulLoss

__all__ = ["EqualWeighting", "LossWeighting", "Losses", "check_scalar", "loss_vector", "weighted_sum"]

Losses = Tensor | Sequence[Tensor]


class LossWeighting(StatefulLoss):
    """Base of the weightings: holds the weights of the last call in training in a buffer, for a log.

    A call is in training if the module is in training mode and gradients are on.

    Args:
        num_tasks: Number of losses.

    Raises:
        ValueError: If ``num_tasks`` is below one.
    """

    weight: Tensor

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self.num_tasks = at_least("num_tasks", num_tasks, 1)
        self.register_buffer("weight", torch.ones(num_tasks))

    def weights(self) -> Tensor:
        """Return a copy of the weights that the last call in training used, ``(tasks,)``."""
        return self.weight.detach().clone()

    def step(self) -> None:
        """End a training epoch; what has nothing to do then keeps this method, so that one loop serves all."""

    def extra_repr(self) -> str:
        """Show how to build the weighting again."""
        return str(self.num_tasks)


class EqualWeighting(LossWeighting):
    """Add the losses up."""

    def forward(self, losses: Losses) -> Tensor:
        """Return the sum of the losses."""
        return loss_vector(losses, self.num_tasks).sum()


def loss_vector(losses: Losses, num_tasks: int) -> Tensor:
    """Return the losses in one vector, float32 for half precision.

    Args:
        losses: A vector, or one scalar for each task.
        num_tasks: Number of losses expected.

    Shape:
        - losses: ``(tasks,)``, or scalars
        - output: ``(tasks,)``

    Raises:
        ValueError: If there are more or fewer losses, or one is no scalar.
        TypeError: If one is no tensor.
    """
    if isinstance(losses, Tensor):
        check_shape("losses", losses, (num_tasks,), "(tasks,)")
        return losses.to(accumulation_dtype(losses))
    if len(losses) != num_tasks:
        raise ValueError(f"`losses` must hold {num_tasks} losses, one for each task, got {len(losses)}.")
    for index, loss in enumerate(losses):
        check_scalar(f"losses[{index}]", loss)
    dtype = reduce(torch.promote_types, [accumulation_dtype(loss) for loss in losses])
    return torch.stack([loss.to(dtype) for loss in losses])


def weighted_sum(losses: Tensor, weight: Tensor) -> Tensor:
    """Return ``sum_k w_k L_k``; the weights are copied, so they may change before the backward pass.

    Shape:
        - losses, weight: ``(tasks,)``
        - output: scalar
    """
    return (weight.detach().clone().to(losses.dtype) * losses).sum()


def check_scalar(name: str, loss: Tensor) -> None:
    """Raise unless ``loss`` is a tensor without axes."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"`{name}` must be a scalar tensor, got {type(loss).__name__}.")
    if loss.dim() != 0:
        raise ValueError(f"`{name}` must be a scalar, got shape {tuple(loss.shape)}. Reduce it first.")
