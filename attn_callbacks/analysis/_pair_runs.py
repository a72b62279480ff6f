"""The runs behind interactions of heads: exact for some pairs, by gate gradients for all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attn_callbacks.analysis._ablated_runs import AblatedRuns, can_reuse
from attn_callbacks.analysis._budget import Budget
from attn_callbacks.analysis._doubts import check_heads, check_reached
from attn_callbacks.analysis._experiment import HeadExperiment
from attn_callbacks.analysis._moments import SampleMoments
from attn_callbacks.analysis._recorded import Recorded

__all__ = ["PairSums", "estimated_pairs", "exact_pairs"]


class PairSums:
    """What is added up over samples.

    Args:
        heads: Number of heads.
    """

    def __init__(self, heads: int) -> None:
        self.pairs = SampleMoments(heads, heads)
        self.alone, self.losses = SampleMoments(heads), SampleMoments()


def exact_pairs(experiment: HeadExperiment, budget: Budget, pairs: list[tuple[int, int]], *, mean: bool) -> PairSums:
    """Run without each head of ``pairs``, then without both of each pair."""
    sums, changes = PairSums(len(experiment.table)), dict[tuple[int, ...], Tensor]()
    singles = sorted({head for pair in pairs for head in pair})
    sets: list[tuple[int, ...]] = [*((head,) for head in singles), *pairs]
    runs = AblatedRuns(experiment, budget, sets)
    sums.losses = runs.losses
    for index, change in runs.changes(mean=mean):
        off = sets[index]
        changes[off] = change  # singles come first in each batch
        if len(off) == 1:
            sums.alone.add(change, *off)
        else:
            _add_pair(sums, off, changes)
    return sums


def _add_pair(sums: PairSums, pair: tuple[int, ...], changes: dict[tuple[int, ...], Tensor]) -> None:
    first, second = pair
    interaction = changes[pair] - changes[(first,)] - changes[(second,)]
    sums.pairs.add(interaction, first, second)
    sums.pairs.add(interaction, second, first)


def estimated_pairs(experiment: HeadExperiment, budget: Budget) -> PairSums:
    """Run with gates once as it is, and once without each head from there on."""
    heads = len(experiment.table)
    sums = PairSums(heads)
    budget.plan(len(experiment.batches) * (heads + 1))
    for number, batch in enumerate(experiment.batches):
        losses, gates = experiment.gates(batch)
        if number == 0:
            check_heads(experiment, budget, losses)
            _check_reached(experiment, gates)
        sums.losses.add(losses)
        budget.step()
        start = _start(experiment, budget, batch)
        changes = torch.full((heads, heads, len(losses)), torch.nan)  # of the gate of each column, without each row
        for off in range(heads):
            if budget.is_spent:
                break
            without, others = experiment.gates(batch, [off], from_off=True, recorded=start)
            sums.alone.add(without - losses, off)
            changes[off] = (gates - others).float()
            changes[off, off] = torch.nan
            budget.step()
        # within a layer both orders of a pair are known, else the one that takes away the head that runs first
        sums.pairs.add(torch.stack([changes, changes.transpose(0, 1)]).nanmean(dim=0))
        if budget.is_spent:
            break
    return sums


def _start(experiment: HeadExperiment, budget: Budget, batch: Any) -> Recorded | None:
    """Return an unchanged run that others may begin from, if they may."""
    if budget.is_spent:
        return None
    recorded, every = experiment.record(batch), range(len(experiment.table))
    return recorded if can_reuse(experiment, batch, recorded, every, is_disturbed=False) else None


def _check_reached(experiment: HeadExperiment, first: Tensor) -> None:
    """Look for a gradient in the other batches as well, if there is none in the first."""
    found = first
    for batch in experiment.batches[1:]:
        if bool(found.nan_to_num().any()):
            return
        _, found = experiment.gates(batch)
    check_reached(found)
