"""Weigh losses by how slowly they fell from one epoch to the next."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from losses._checks import check_shape, in_range
from losses._distributed import sum_over_processes
from losses.balancing._base import Losses, LossWeighting, loss_vector, weighted_sum

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["DynamicWeightAverage", "dynamic_average_weights"]


def dynamic_average_weights(latest: Tensor, previous: Tensor, temperature: float = 2.0) -> Tensor:
    r"""Return weights that are higher for tasks whose loss falls more slowly.

    .. math::
        w_k = K \, \frac{e^{r_k / T}}{\sum_i e^{r_i / T}}, \qquad r_k = \frac{L_k(t - 1)}{L_k(t - 2)}

    Compares losses with themselves only, so their units do not matter; but it reacts to the noise of epoch averages,
    and it does not know which loss matters. Costs nothing.

    Args:
        latest: Average loss of each task in the last epoch.
        previous: The same, one epoch before. A ratio needs two finite losses above zero; where there are none, it
            counts as one, neither falling nor rising.
        temperature: Higher means more equal weights.

    Shape:
        - latest, previous: ``(tasks,)``
        - output: ``(tasks,)``, summing to the number of tasks

    Raises:
        ValueError: If the shapes differ, or ``temperature`` is not above zero.

    Example:
        >>> import torch
        >>> loss = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> weight = dynamic_average_weights(torch.tensor([0.5, 9.0]), torch.tensor([1.0, 10.0]))
        >>> (weight * loss).sum().backward()
        >>> loss.grad
        tensor([0.9003, 1.0997])

    References:
        Liu, Johns and Davison, "End-to-End Multi-Task Learning with Attention", CVPR 2019, equation 7.
    """
    in_range("temperature", temperature, 0, above=True)
    check_shape("previous", previous, latest.shape, "(tasks,)")
    defined = (latest > 0) & (previous > 0) & torch.isfinite(latest) & torch.isfinite(previous)
    ratio = torch.where(defined, latest / torch.where(defined, previous, 1.0), 1.0)
    return len(ratio) * (ratio / temperature).softmax(dim=0)


class DynamicWeightAverage(LossWeighting):
    """Weigh losses by their fall over epochs; see :func:`dynamic_average_weights`.

    In training mode, with gradients on, every call adds to the averages of the epoch; call :meth:`step` at the end of
    every training epoch. Weights are one in the first two epochs. Sums and weights are in the state dict, so a run
    resumes exactly, also in the middle of an epoch. Keep it outside activation checkpointing: a forward pass that runs
    again would count its losses twice.

    In a distributed run every such call adds the losses up over the processes, ``2 * num_tasks`` numbers. It
    cannot wait for the end of the epoch: ``DistributedDataParallel`` overwrites the buffers of all processes with those
    of the first before every forward pass, and a checkpoint holds the first one's only.

    Args:
        num_tasks: Number of losses.
        temperature: Higher means more equal weights.
        process_group: Processes to average over; ``None`` means all of them.

    Shape:
        - forward: ``(num_tasks,)`` or scalars to a scalar

    Raises:
        ValueError: If ``num_tasks`` is below one, or ``temperature`` is not above zero.

    Example:
        >>> import torch
        >>> weighting = DynamicWeightAverage(2)
        >>> for losses in ([1.0, 10.0], [0.5, 9.0]):
        ...     losses = torch.tensor(losses, requires_grad=True)
        ...     weighting(losses).backward()
        ...     weighting.step()
        >>> weighting(torch.tensor([0.5, 8.0]))
        tensor(9.2475)
    """

    loss_sum: Tensor
    loss_count: Tensor
    latest_loss: Tensor
    previous_loss: Tensor

    def __init__(self, num_tasks: int, temperature: float = 2.0, *, process_group: ProcessGroup | None = None) -> None:
        super().__init__(num_tasks)
        self.temperature = in_range("temperature", temperature, 0, above=True)
        self.process_group = process_group
        self.register_buffer("loss_sum", torch.zeros(num_tasks))
        self.register_buffer("loss_count", torch.zeros(num_tasks, dtype=torch.long))
        self.register_buffer("latest_loss", torch.zeros(num_tasks))  # zero: no epoch yet
        self.register_buffer("previous_loss", torch.zeros(num_tasks))

    def forward(self, losses: Losses) -> Tensor:
        """Return the weighted sum of the losses; in training, remember them for the average of the epoch."""
        vector = loss_vector(losses, self.num_tasks)
        if self.learning:
            self._remember(vector.detach())
        return weighted_sum(vector, self.weight)

    @torch.no_grad()
    def step(self) -> None:
        """End a training epoch: set the weights of the next one. Without losses since the last call nothing changes."""
        seen = self.loss_count > 0
        mean = torch.where(seen, self.loss_sum / self.loss_count.clamp(min=1), 0.0)
        self.previous_loss.copy_(torch.where(seen.any(), self.latest_loss, self.previous_loss))
        self.latest_loss.copy_(torch.where(seen.any(), mean, self.latest_loss))
        self.weight.copy_(dynamic_average_weights(self.latest_loss, self.previous_loss, self.temperature))
        self.loss_sum.zero_()
        self.loss_count.zero_()

    def extra_repr(self) -> str:
        """Show how to build the weighting again."""
        return f"{self.num_tasks}, temperature={self.temperature}"

    @torch.no_grad()
    def _remember(self, losses: Tensor) -> None:
        """Add the mean over the processes to the sums; a loss that is not finite would spoil two epochs."""
        finite = torch.isfinite(losses)
        values = torch.stack([torch.where(finite, losses, 0.0), finite.to(losses.dtype)])  # (2, tasks)
        values = sum_over_processes(values, self.process_group)
        self.loss_sum.add_(values[0] / values[1].clamp(min=1))
        self.loss_count.add_((values[1] > 0).long())
