"""Pruning: which heads can go, and what the loss is without all of them together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attn_callbacks._checks import at_least, check_number
from attn_callbacks._plain import plain
from attn_callbacks.analysis._budget import Budget, Progress
from attn_callbacks.analysis._doubts import check_heads, check_reached
from attn_callbacks.analysis._experiment import HeadExperiment
from attn_callbacks.analysis._moments import SampleMoments
from attn_callbacks.analysis._table import Head

__all__ = ["PruningCurve", "RemovableHeads", "pruning_curve"]


class RemovableHeads(NamedTuple):
    """Heads that can go together.

    Args:
        heads: The heads, those that matter least first.
        change: How much the mean loss rises without all of them.
        standard_error: Of ``change``, over samples.
    """

    heads: tuple[Head, ...]
    change: float
    standard_error: float


@dataclass(frozen=True, eq=False)
class PruningCurve:
    """What `pruning_curve` found.

    Args:
        layer_names: Name of each layer.
        heads: Heads in the order in which they were taken.
        removed: Number of heads that are off at each point of the curve, beginning with 0.
        change: How much the mean loss rises at each point, ``(points,)``.
        standard_error: Of ``change``, over samples; each is compared with itself.
        loss: Mean loss with all heads; NaN if the time was up before it was known.
        is_complete: The curve was followed to its end before the time was up.
    """

    layer_names: tuple[str, ...]
    heads: tuple[Head, ...]
    removed: tuple[int, ...]
    change: Tensor
    standard_error: Tensor
    loss: float
    is_complete: bool

    def removable(self, rise: float = 0.01) -> RemovableHeads:
        """Return as many heads as can go for a small rise of the loss, and what was measured without them.

        The last point of the curve at which the change and two of its standard errors stay within the limit. Chosen on
        the samples it was measured on: measure such a set once more on others, by :func:`ablate_heads`.

        Args:
            rise: Limit, as a share of the size of the loss with all heads.
        """
        check_number("rise", rise)
        errors = self.standard_error.nan_to_num(torch.inf)
        errors[0] = 0.0  # nothing is off
        fine = (self.change + 2 * errors <= rise * abs(self.loss)).nonzero()
        point = int(fine[-1]) if len(fine) else 0
        return RemovableHeads(self.heads[: self.removed[point]], float(self.change[point]), float(errors[point]))

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, lists and strings; NaN becomes ``None``."""
        return {name: plain(value) for name, value in vars(self).items()}


def pruning_curve(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    scores: Tensor | None = None,
    heads_per_step: int = 1,
    layers: Sequence[str] | None = None,
    *,
    seconds: float | None = None,
    progress: Progress = False,
) -> PruningCurve:
    """Take heads away, those that matter least first, and measure the loss after each step.

    What heads do alone does not add up: of two that stand in for one another either can go, not both. So importance is
    measured again after each step, by the gate gradients of what is left, in the same forward that measures the loss.
    Heads that no gradient reaches stay.

    Costs a forward and a backward a step and batch; with ``scores`` a forward. With 144 heads, ``heads_per_step=14``
    takes 10 % at a time.

    Args:
        model: The model.
        batches: Whatever ``loss`` understands. Read once and kept.
        loss: Runs the model on a batch: ``loss(model, batch)`` returns one loss a sample, ``(samples,)``; NaN for one
            that does not count. With a graph unless there are ``scores``.
        scores: Takes heads in the order of these, the lowest first, without measuring again: such as
            ``ablate_heads(...).change``, ``(layers, heads)``. Heads without a score (NaN) stay.
        heads_per_step: Number of heads taken at once.
        layers: Names or glob patterns of attention modules; ``None`` takes all.
        seconds: Time after which no step is begun. ``None``: all heads are taken.
        progress: Called with the share that is done, from 0 to 1; ``True`` draws a bar on standard error.

    Raises:
        RuntimeError: If the losses with all heads off are those without, two runs of the unchanged model differ as
            much, or, without ``scores``, no gradient reaches a head.
        ValueError: If a number is below 1, ``scores`` has another shape, ``loss`` returns something else or nothing but
            NaN, or there is no batch.

    Example:
        >>> model = nn.MultiheadAttention(4, num_heads=2, batch_first=True)
        >>> def loss(model, tokens):
        ...     return model(tokens, tokens, tokens)[0].square().mean(dim=(1, 2))
        >>> curve = pruning_curve(model, [torch.randn(8, 3, 4)], loss)
        >>> curve.removed, len(curve.heads)
        ((0, 1, 2), 2)

    References:
        Michel, Levy and Neubig, "Are Sixteen Heads Really Better than One?", 2019, section 4 (there with importance
        measured once).
    """
    at_least("heads_per_step", heads_per_step, 1)
    experiment, budget = HeadExperiment(model, batches, loss, layers), Budget(seconds, progress)
    with experiment.open():
        experiment.find_all(budget)
        check_heads(experiment, budget)
        known = None if scores is None else experiment.table.gather(scores.detach().double().cpu())
        return _Curve(experiment, budget, known, heads_per_step).followed()


class _Curve:
    """One way from all heads to none."""

    def __init__(self, experiment: HeadExperiment, budget: Budget, scores: Tensor | None, per_step: int) -> None:
        self._experiment, self._budget, self._scores, self._per_step = experiment, budget, scores, per_step
        self._base: list[Tensor] = []  # losses of each batch with all heads
        self._taken: list[int] = []
        self._points: list[tuple[int, float, float]] = []
        self._is_complete = False

    def followed(self) -> PruningCurve:
        """Follow it until no head is left or the time is up."""
        left = len(self._experiment.table) if self._scores is None else int((~self._scores.isnan()).sum())
        self._budget.plan(self._runs(left) + len(self._experiment.batches))
        while True:
            importance = self._measured()
            if importance is None:
                break
            next_ones = self._lowest(importance if self._scores is None else self._scores.clone())
            if not next_ones:
                self._is_complete = True
                break
            self._taken += next_ones
        numbers, changes, errors = zip(*self._points, strict=True) if self._points else ((0,), (0.0,), (0.0,))
        table = self._experiment.table
        return PruningCurve(
            layer_names=table.names,
            heads=tuple(table.heads[number] for number in self._taken[: numbers[-1]]),
            removed=numbers,
            change=torch.tensor(changes, dtype=torch.float64),
            standard_error=torch.tensor(errors, dtype=torch.float64),
            loss=float(torch.cat(self._base).nanmean()) if self._points else torch.nan,
            is_complete=self._is_complete,
        )

    def _lowest(self, scores: Tensor) -> list[int]:
        """Return those that are taken next; none if no head with a score is left."""
        scores[self._taken] = torch.nan
        left = int((~scores.isnan()).sum())
        self._budget.expect(self._runs(left))
        order: list[int] = scores.nan_to_num(torch.inf).argsort(stable=True).tolist()
        return order[: min(self._per_step, left)]

    def _runs(self, heads: int) -> int:
        """Return how many runs it takes to take so many heads."""
        return -(-heads // self._per_step) * len(self._experiment.batches)

    def _measured(self) -> Tensor | None:
        """Measure one point, and the importance of what is left ``(all heads,)``; ``None`` if the time was up."""
        change, importance, is_first = SampleMoments(), SampleMoments(len(self._experiment.table)), not self._points
        for number, batch in enumerate(self._experiment.batches):
            if self._budget.is_spent and not (is_first and number == 0):
                return None
            if self._scores is None:
                losses, gradients = self._experiment.gates(batch, self._taken)
                importance.add(gradients.abs())
            else:
                losses = self._experiment.losses(batch, self._taken)
            if is_first:
                self._base.append(losses)
            change.add(losses - self._base[number])
            self._budget.step()
        if is_first and self._scores is None:
            check_reached(importance.mean())
        self._points.append((len(self._taken), float(change.mean()), float(change.standard_error())))
        return importance.mean()
