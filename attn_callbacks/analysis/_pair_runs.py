"""The runs behind interactions of heads: exact for some pairs, by gate gradients for all."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_callbacks.analysis._ablated_runs import AblatedRuns
from attn_callbacks.analysis._budget import Budget
from attn_callbacks.analysis._doubts import check_heads, check_reached
from attn_callbacks.analysis._experiment import HeadExperiment
from attn_callbacks.analysis._moments import SampleMoments

__all__ = ["PairSums", "estimated_pairs", "exact_pairs"]


class PairSums:
    """What is added up over samples.

    Args:
        heads: Number of heads.
    """

    def __init__(self, heads: int) -> None:
        self.both, self.half = SampleMoments(heads, heads), SampleMoments(heads, heads)
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
    sums.both.add(interaction, first, second)
    sums.both.add(interaction, second, first)


def estimated_pairs(experiment: HeadExperiment, budget: Budget) -> PairSums:
    """Run with gates once as it is and once without each head."""
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
        changes = torch.full((heads, heads, len(losses)), torch.nan)  # of the gate of each column, without each row
        for off in range(heads):
            if budget.is_spent:
                break
            without, others = experiment.gates(batch, [off])
            sums.alone.add(without - losses, off)
            changes[off] = (gates - others).float()
            changes[off, off] = torch.nan
            budget.step()
        _add_all(sums, changes, is_first=number == 0)
        if budget.is_spent:
            break
    return sums


def _check_reached(experiment: HeadExperiment, first: Tensor) -> None:
    """Look for a gradient in the other batches as well, if there is none in the first."""
    found = first
    for batch in experiment.batches[1:]:
        if bool(found.nan_to_num().any()):
            return
        _, found = experiment.gates(batch)
    check_reached(found)


def _add_all(sums: PairSums, changes: Tensor, *, is_first: bool) -> None:
    mirrored = changes.transpose(0, 1)
    if is_first:  # where the time was up, one order of a pair has to do; later batches are taken as a whole or not
        sums.both.add(torch.stack([changes, mirrored]).nanmean(dim=0))
    else:
        sums.both.add((changes + mirrored) / 2)
    sums.half.add((changes - mirrored) / 2)
