"""Combine the gradients of several losses instead of adding the losses: an adapter for torchjd, an optional package."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from losses._checks import accumulation_dtype, one_of
from losses._distributed import process_count, sum_over_processes
from losses.balancing._base import check_scalar

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["GradientSurgery"]

AGGREGATORS = ("pcgrad", "upgrad")
Gradients = list[list[Tensor | None]]


class GradientSurgery:
    r"""Fill ``.grad`` with a combination of the losses' gradients in which they do not work against each other.

    :meth:`backward` stands in place of ``loss.backward()``. With :math:`J` the gradients of the losses in the shared
    parameters, one a row,

    - ``"upgrad"`` projects each row onto the vectors that have no negative inner product with any row, and takes the
      **mean**. A small enough step lowers every loss.
    - ``"pcgrad"`` takes from each row its components against the other rows, one after the other in random order, and
      takes the **sum**. No loss is safe from rising where there are more than two.

    Rows without conflict are added or averaged as they are. A parameter that one loss only reaches, as those of a
    head, gets the gradient of that loss; one that no loss reaches keeps its ``.grad``. Gradients are added to what
    ``.grad`` holds, so accumulation works as ever, each part with surgery of its own.

    Costs one backward pass per loss, memory for as many gradients, and waits for the device. In a distributed run the
    rows are averaged over the processes first, since ``torch.autograd.grad`` bypasses ``DistributedDataParallel``: call
    the wrapped module under its ``no_sync()``.

    Lightning's automatic optimization calls ``backward`` on its own, once; switch it off::

        class Model(LightningModule):
            def __init__(self):
                super().__init__()
                self.automatic_optimization = False
                self.surgery = GradientSurgery("upgrad")

            def training_step(self, batch, batch_idx):
                optimizer = self.optimizers()
                optimizer.zero_grad()
                scaler = getattr(self.trainer.precision_plugin, "scaler", None)  # precision="16-mixed"
                self.surgery.backward(self.losses(batch), self.parameters(), scaler=scaler)  # not manual_backward
                optimizer.step()

    Args:
        aggregator: ``"upgrad"``, ``"pcgrad"``, or a function from the rows to one row, such as any aggregator of
            torchjd. One with a state of its own is not in a state dict: save it as well.
        process_group: Processes to average over; ``None`` means all of them.

    Raises:
        ValueError: If ``aggregator`` is unknown.
        ImportError: If torchjd or scipy is missing.

    Example:
        >>> import torch
        >>> weight = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> losses = [weight @ torch.tensor([1.0, 0.0]), weight @ torch.tensor([-1.0, 1.0])]
        >>> GradientSurgery("pcgrad").backward(losses, [weight])
        >>> weight.grad
        tensor([0.5000, 1.5000])

    References:
        Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020, algorithm 1 (PCGrad).
        Quinton and Rey, "Jacobian Descent for Multi-Objective Optimization", arXiv 2406.16232, 2024 (UPGrad).
    """

    def __init__(
        self,
        aggregator: str | Callable[[Tensor], Tensor] = "upgrad",
        *,
        process_group: ProcessGroup | None = None,
    ) -> None:
        self.aggregator = aggregator
        self.process_group = process_group
        self._aggregate = _named(aggregator) if isinstance(aggregator, str) else aggregator

    def backward(
        self,
        losses: Sequence[Tensor],
        parameters: Iterable[Tensor],
        *,
        scaler: torch.amp.GradScaler | None = None,
        retain_graph: bool = False,
    ) -> None:
        """Add the combined gradient of the losses to ``.grad`` of the parameters.

        Args:
            losses: One scalar for each task; not a vector, whose graph leads through all tasks.
            parameters: Everything to train, shared or not. Parameters that require no gradient are left out.
            scaler: Scales the losses, and so ``.grad``, as ``scaler.scale(loss).backward()`` does; then use
                ``scaler.step(optimizer)``. Where a scaled gradient overflows, so does ``.grad``, and the step is
                skipped.
            retain_graph: Keep the graph for another backward pass.

        Raises:
            ValueError: If there is no loss, a loss is no scalar, or no loss depends on the parameters.
            TypeError: If ``losses`` is one tensor, or a loss is no tensor.
        """
        trained = [parameter for parameter in dict.fromkeys(parameters) if parameter.requires_grad]
        gradients = _gradients(_scaled(losses, scaler), trained, retain_graph)
        reached = self._reached(gradients)
        if not trained or not bool((reached > 0).any()):
            raise ValueError("No loss depends on `parameters`: pass the parameters of the model that made the losses.")
        with torch.no_grad(), torch.autocast(trained[0].device.type, enabled=False):
            self._combine(gradients, trained, reached.tolist())

    def __repr__(self) -> str:
        """Show how to build it again."""
        return f"{type(self).__name__}({self.aggregator!r})"

    def _combine(self, gradients: Gradients, trained: list[Tensor], reached: list[int]) -> None:
        shared = [index for index, count in enumerate(reached) if count > 1]
        single = [index for index, count in enumerate(reached) if count == 1]
        changes: dict[int, Tensor] = {}
        if shared:
            rows = torch.stack([_row(row, trained, shared) for row in gradients])  # (tasks, elements)
            joint = self._mean(self._aggregate(self._mean(rows)))  # again: what is drawn may differ between processes
            changes |= _split(joint, trained, shared)
        if single:
            alone = [next((row[i] for row in gradients if row[i] is not None), None) for i in range(len(trained))]
            changes |= _split(self._mean(_row(alone, trained, single)), trained, single)
        for index, change in changes.items():
            parameter = trained[index]
            change = change.to(parameter.dtype)
            parameter.grad = change if parameter.grad is None else parameter.grad.add_(change)

    def _reached(self, gradients: Gradients) -> Tensor:
        """Return how many losses reach each parameter, in any process."""
        reached = torch.tensor([[part is not None for part in row] for row in gradients], dtype=torch.long)
        if process_count(self.process_group) > 1:
            device = next((part.device for row in gradients for part in row if part is not None), reached.device)
            reached = sum_over_processes(reached.to(device), self.process_group)
        return (reached > 0).sum(dim=0)

    def _mean(self, tensor: Tensor) -> Tensor:
        count = process_count(self.process_group)
        return tensor if count == 1 else sum_over_processes(tensor, self.process_group) / count


def _named(name: str) -> Callable[[Tensor], Tensor]:
    one_of("aggregator", name, AGGREGATORS)
    try:
        from torchjd.aggregation import PCGrad, UPGrad

        from losses.balancing._dual_cone import project_weights
    except ImportError as error:
        raise ImportError("`GradientSurgery` needs torchjd and scipy: pip install attn-callbacks[surgery].") from error
    return PCGrad() if name == "pcgrad" else UPGrad(projector=cast("Any", project_weights))


def _scaled(losses: Sequence[Tensor], scaler: torch.amp.GradScaler | None) -> list[Tensor]:
    if isinstance(losses, Tensor):
        raise TypeError(
            f"`losses` must be a sequence of scalars, one for each task, got a tensor of shape {tuple(losses.shape)}. "
            "Pass the losses from before they were stacked: the graph of a vector leads through all tasks."
        )
    if not losses:
        raise ValueError("`losses` holds no loss.")
    for index, loss in enumerate(losses):
        check_scalar(f"losses[{index}]", loss)
    return list(losses) if scaler is None else [scaler.scale(loss) for loss in losses]


def _gradients(losses: list[Tensor], trained: list[Tensor], retain_graph: bool) -> Gradients:
    """Return the gradient of each loss in each parameter, ``None`` where it does not depend on it."""
    if not trained:
        return [[] for _ in losses]
    rows: Gradients = []
    for index, loss in enumerate(losses):
        keep = retain_graph or index < len(losses) - 1
        parts: Sequence[Tensor | None] = [None] * len(trained)
        if loss.requires_grad:
            parts = torch.autograd.grad(loss, trained, retain_graph=keep, allow_unused=True)
        rows.append(list(parts))
    return rows


def _row(parts: Sequence[Tensor | None], trained: list[Tensor], chosen: list[int]) -> Tensor:
    """Return the gradient in the chosen parameters as one vector, at least float32."""
    pieces = []
    for index in chosen:
        part, parameter = parts[index], trained[index]
        part = torch.zeros_like(parameter) if part is None else part
        pieces.append(part.flatten().to(accumulation_dtype(parameter)))
    return torch.cat(pieces)


def _split(row: Tensor, trained: list[Tensor], chosen: list[int]) -> dict[int, Tensor]:
    pieces = row.split([trained[index].numel() for index in chosen])
    return {index: piece.view_as(trained[index]) for index, piece in zip(chosen, pieces, strict=True)}
