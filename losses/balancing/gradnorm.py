"""Weigh losses so that their gradients have comparable norms, and tasks learn at comparable rates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from losses._checks import accumulation_dtype, check_shape, in_range
from losses._distributed import process_count, sum_over_processes
from losses.balancing._base import Losses, LossWeighting, loss_vector, weighted_sum

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["GradNorm", "gradnorm_weights"]

_SMALLEST = 1e-6  # a weight of zero could never grow again


def gradnorm_weights(
    weight: Tensor, norms: Tensor, progress: Tensor, *, alpha: float = 1.5, lr: float = 0.025
) -> Tensor:
    r"""Move weights one step towards gradient norms that fit the progress of the tasks.

    .. math::
        L_{\text{grad}} = \sum_k \left| G_k - \bar G \, r_k^{\alpha} \right|, \qquad G_k = w_k \, \|\nabla L_k\|, \qquad
        r_k = \frac{\tilde L_k}{\frac{1}{K} \sum_i \tilde L_i}

    with :math:`\bar G` the mean of :math:`G_k`, and the target a constant. The step is one of gradient descent on
    :math:`\log w`, with :math:`L_{\text{grad}}` in units of :math:`\bar G`; then the weights are scaled to sum to
    :math:`K`. The paper leaves the optimizer open. Descent on :math:`w` itself takes steps in proportion to the norms:
    it never settles where these are large or far apart, while here a weight moves by at most ``lr * K`` of itself.

    Args:
        weight: Weights now, above zero.
        norms: Norm of the gradient of each loss, unweighted, in the parameters that the tasks share.
        progress: Loss of each task divided by its initial loss. Below zero counts as zero.
        alpha: How much more a slow task may pull; zero makes all norms equal.
        lr: Step size.

    Shape:
        - weight, norms, progress: ``(tasks,)``
        - output: ``(tasks,)``, summing to the number of tasks

    Raises:
        ValueError: If a shape does not fit, ``alpha`` is negative or ``lr`` not above zero.

    Example:
        >>> import torch
        >>> gradnorm_weights(torch.ones(2), norms=torch.tensor([3.0, 1.0]), progress=torch.ones(2))
        tensor([0.9750, 1.0250])

    References:
        Chen et al., "GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask Networks",
        ICML 2018, section 3 and algorithm 1.
    """
    in_range("alpha", alpha, 0)
    in_range("lr", lr, 0, above=True)
    check_shape("norms", norms, weight.shape, "(tasks,)")
    check_shape("progress", progress, weight.shape, "(tasks,)")
    tiny = torch.finfo(norms.dtype).tiny
    pull = weight * norms
    pull = pull / pull.mean().clamp(min=tiny)
    progress = progress.clamp(min=0)
    rate = progress / progress.mean().clamp(min=tiny)
    slope = pull * torch.sign(pull - rate**alpha)  # of the objective in the logarithm of the weight
    moved = (weight * torch.exp(-lr * slope)).clamp(min=_SMALLEST)
    return len(moved) * moved / moved.sum()


class GradNorm(LossWeighting):
    """Weigh losses by their gradients in a shared layer; see :func:`gradnorm_weights`.

    In training mode, with gradients on, every call uses the weights of the call before, then moves them, by hand:
    ``losses`` keep their graph, and one ordinary ``.backward()`` of the total follows. It costs one more backward pass
    per task, from the loss down to ``shared``: take the last shared layer, or the activation that the tasks share. All
    state is in the state dict, and a run resumes exactly. A step whose losses or gradients are not finite, as loss
    scaling provokes, moves nothing. Keep it outside activation checkpointing: a forward pass that runs again would move
    the weights twice.

    In a distributed run gradients are averaged over the processes, one message of the size of ``shared`` per task, so
    that norms are those of the whole batch. Compile the model, not this module: it differentiates within.

    Args:
        num_tasks: Number of losses.
        alpha: How much more a slow task may pull; the paper takes 1.5 for tasks that differ much, 0.12 for like ones.
        lr: Step size.
        initial_loss: Loss of each task at the start; ``None`` takes that of the first call, which one batch decides.
            For a cross entropy, the logarithm of the number of classes is steadier.
        process_group: Processes to average over; ``None`` means all of them.

    Shape:
        - initial_loss: ``(num_tasks,)``
        - forward: ``(num_tasks,)`` or scalars to a scalar

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> weighting, shared = GradNorm(2), torch.nn.Linear(3, 3)
        >>> features = shared(torch.ones(4, 3))
        >>> total = weighting([features.square().mean(), 100 * features.square().mean()], shared.parameters())
        >>> total.backward()
        >>> weighting.next_weight
        tensor([1.0250, 0.9750])
    """

    next_weight: Tensor
    initial_loss: Tensor

    def __init__(
        self,
        num_tasks: int,
        alpha: float = 1.5,
        *,
        lr: float = 0.025,
        initial_loss: Sequence[float] | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(num_tasks)
        self.alpha = in_range("alpha", alpha, 0)
        self.lr = in_range("lr", lr, 0, above=True)
        self.process_group = process_group
        self.given = None if initial_loss is None else list(initial_loss)
        for loss in self.given or []:
            in_range("initial_loss", loss, 0, above=True)
        if self.given is not None and len(self.given) != num_tasks:
            raise ValueError(f"`initial_loss` must hold {num_tasks} losses, one for each task, got {len(self.given)}.")
        self.register_buffer("next_weight", torch.ones(num_tasks))
        self.register_buffer("initial_loss", torch.tensor(self.given or [0.0] * num_tasks))  # zero: not seen yet

    def forward(self, losses: Losses, shared: Tensor | Iterable[Tensor]) -> Tensor:
        """Return the weighted sum of the losses; in training, move the weights for the next call.

        Args:
            losses: Losses of the tasks, above zero. One by one they cost less than as a vector: the graph of a vector
                leads through all tasks.
            shared: Parameters that all tasks share, or the activation that they share.

        Raises:
            ValueError: If ``shared`` is empty, or a loss does not depend on it.
        """
        vector = loss_vector(losses, self.num_tasks)
        weight = self.next_weight.clone()
        if self.learning:
            norms = self._norms(losses, [shared] if isinstance(shared, Tensor) else list(shared))
            self.weight.copy_(weight)
            self._move(norms, self._mean(vector.detach()))
        return weighted_sum(vector, weight)

    def extra_repr(self) -> str:
        """Show how to build the weighting again."""
        given = "" if self.given is None else f", initial_loss={self.given}"
        return f"{self.num_tasks}, alpha={self.alpha}, lr={self.lr}{given}"

    def _norms(self, losses: Losses, shared: list[Tensor]) -> Tensor:
        if not shared:
            raise ValueError("`shared` is empty: pass the parameters of the last layer that all tasks share.")
        rows = (self._mean(_gradient(index, loss, shared)) for index, loss in enumerate(losses))
        return torch.stack([row.norm() for row in rows])

    @torch.no_grad()
    def _move(self, norms: Tensor, losses: Tensor) -> None:
        usable = torch.isfinite(norms).all() & torch.isfinite(losses).all()
        unseen = usable & (self.initial_loss == 0) & (losses > 0)
        self.initial_loss.copy_(torch.where(unseen, losses, self.initial_loss))
        known = self.initial_loss > 0
        progress = torch.where(known, losses / torch.where(known, self.initial_loss, 1.0), 1.0)
        moved = gradnorm_weights(self.next_weight, norms, progress, alpha=self.alpha, lr=self.lr)
        self.next_weight.copy_(torch.where(usable, moved, self.next_weight))

    def _mean(self, tensor: Tensor) -> Tensor:
        return sum_over_processes(tensor, self.process_group) / process_count(self.process_group)


def _gradient(index: int, loss: Tensor, shared: list[Tensor]) -> Tensor:
    """Return the gradient of one loss in all shared parameters as one vector."""
    parts: Sequence[Tensor | None] = [None]
    if loss.requires_grad:
        parts = torch.autograd.grad(loss, shared, retain_graph=True, allow_unused=True)
    if all(part is None for part in parts):
        raise ValueError(
            f"`losses[{index}]` does not depend on `shared`: pass parameters that all tasks share, and keep constant "
            "terms out of the weighting."
        )
    return torch.cat(
        [
            (torch.zeros_like(parameter) if part is None else part).flatten().to(accumulation_dtype(parameter))
            for part, parameter in zip(parts, shared, strict=True)
        ]
    )
