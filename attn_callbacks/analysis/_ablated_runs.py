"""Run batches without sets of heads, each run from where something changes in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from attn_callbacks.analysis._budget import Budget
from attn_callbacks.analysis._doubts import check_heads
from attn_callbacks.analysis._experiment import HeadExperiment
from attn_callbacks.analysis._moments import SampleMoments
from attn_callbacks.analysis._recorded import Recorded

__all__ = ["AblatedRuns", "can_reuse"]


class AblatedRuns:
    """Each batch as it is, and without each of some sets of heads.

    Args:
        experiment: Runs the model.
        budget: Counts the runs.
        sets: Numbers of the heads that are off together.
    """

    def __init__(self, experiment: HeadExperiment, budget: Budget, sets: Sequence[tuple[int, ...]]) -> None:
        self.losses = SampleMoments()
        self._experiment, self._budget, self._sets = experiment, budget, sets
        self._reuses: list[bool] = []

    @property
    def reused(self) -> bool:
        """Runs began where something changes, in every batch."""
        return bool(self._reuses) and all(self._reuses)

    def changes(self, *, mean: bool) -> Iterator[tuple[int, Tensor]]:
        """Yield the number of each set and how much its absence changes the losses, batch by batch.

        Ends when the time is up.

        Args:
            mean: Put the mean in the place of a head, not zeros.
        """
        batches = self._experiment.batches
        self._budget.plan(len(batches) * (len(self._sets) + mean))
        means = self._experiment.means(self._budget) if mean else None
        for number, batch in enumerate(batches):
            if (number or mean) and self._budget.is_spent:
                return
            recorded = self._experiment.record(batch)
            self.losses.add(recorded.losses)
            if number == 0:
                check_heads(self._experiment, self._budget, recorded.losses)
            yield from self._of_batch(batch, recorded, means, is_disturbed=number == 0)

    def _of_batch(
        self, batch: Any, recorded: Recorded, means: Mapping[str, Tensor] | None, *, is_disturbed: bool
    ) -> Iterator[tuple[int, Tensor]]:
        start = recorded if self._can_reuse(batch, recorded, is_disturbed) else None
        for index, off in enumerate(self._sets):
            if self._budget.is_spent:
                return
            yield index, self._experiment.losses(batch, off, means, start) - recorded.losses
            self._budget.step()

    def _can_reuse(self, batch: Any, recorded: Recorded, is_disturbed: bool) -> bool:
        first = [min(off) for off in self._sets]
        if self._budget.is_spent or len(first) <= len(self._experiment.table.by_layer(first)):
            return False  # making sure, a run for each layer, would cost more than it saves
        self._reuses.append(can_reuse(self._experiment, batch, recorded, first, is_disturbed=is_disturbed))
        return self._reuses[-1]


def can_reuse(
    experiment: HeadExperiment, batch: Any, recorded: Recorded, heads: Sequence[int], *, is_disturbed: bool
) -> bool:
    """Make sure that runs may begin at the layers of ``heads``, at the price of a run for each.

    Args:
        experiment: Runs the model.
        batch: The batch.
        recorded: Its unchanged run.
        heads: Numbers of the heads.
        is_disturbed: Something has run with heads off since.
    """
    if not is_disturbed:
        experiment.losses(batch, range(len(experiment.table)))
    return experiment.can_reuse(batch, recorded, heads)
