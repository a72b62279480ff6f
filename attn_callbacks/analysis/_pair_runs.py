"""The runs behind interactions of heads: exact for some pairs, by gate gradients for all."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_callbacks.analysis._budget import Budget
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
    batches, sums, reuses = experiment.batches, PairSums(len(experiment.table)), False
    singles = sorted({head for pair in pairs for head in pair})
    budget.plan(len(batches) * (len(singles) + len(pairs) + mean))
    means = experiment.means(budget.step) if mean else None
    for number, batch in enumerate(batches):
        recorded = experiment.record(batch)
        if number == 0:
            experiment.check(recorded.losses)
            reuses = experiment.can_reuse(batch, recorded, singles)
        sums.losses.add(recorded.losses)
        changes: dict[tuple[int, ...], Tensor] = {}
        for off in [*((head,) for head in singles), *pairs]:
            if budget.is_spent:
                return sums
            changes[off] = experiment.losses(batch, off, means, recorded if reuses else None) - recorded.losses
            if len(off) == 1:
                sums.alone.add(changes[off], *off)
            else:
                _add_pair(sums, off, changes)
            budget.step()
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
            experiment.check(losses)
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


def _add_all(sums: PairSums, changes: Tensor, *, is_first: bool) -> None:
    mirrored = changes.transpose(0, 1)
    if is_first:  # where the time was up, one order of a pair has to do; later batches are taken as a whole or not
        sums.both.add(torch.stack([changes, mirrored]).nanmean(dim=0))
    else:
        sums.both.add((changes + mirrored) / 2)
    sums.half.add((changes - mirrored) / 2)
