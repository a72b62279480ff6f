"""Shapley values of heads: what each adds to the model, averaged over the company it may be in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attn_callbacks._checks import at_least, in_range
from attn_callbacks._plain import plain
from attn_callbacks.analysis._budget import Budget, Progress
from attn_callbacks.analysis._doubts import check_heads
from attn_callbacks.analysis._experiment import HeadExperiment
from attn_callbacks.analysis._moments import SampleMoments
from attn_callbacks.analysis._table import HeadLike

__all__ = ["HeadShapley", "head_shapley"]


@dataclass(frozen=True, eq=False)
class HeadShapley:
    r"""What `head_shapley` found; tensors are ``(layers, heads)``, NaN for heads that did not play.

    Args:
        layer_names: Name of each layer.
        value: Mean over permutations of what a head takes off the mean loss when it is added.
        standard_error: Of ``value``, over permutations; of two or more.
        gap: :math:`v(all) - v(none)` less the sum of all values: 0 up to rounding without truncation.
        all_on: Mean loss with all heads; NaN if the time was up before it was known.
        all_off: Mean loss without those that play; likewise.
        permutations: Number of permutations that were completed.
        truncated: Share of additions that were taken as 0 without a run.
        is_complete: All permutations were completed before the time was up.
    """

    layer_names: tuple[str, ...]
    value: Tensor
    standard_error: Tensor
    gap: float
    all_on: float
    all_off: float
    permutations: int
    truncated: float
    is_complete: bool

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, lists and strings; NaN becomes ``None``."""
        return {name: plain(value) for name, value in vars(self).items()}


def head_shapley(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    heads: Sequence[HeadLike] | None = None,
    permutations: int = 32,
    truncation: float = 0.01,
    seed: int = 0,
    layers: Sequence[str] | None = None,
    *,
    seconds: float | None = None,
    progress: Progress = False,
) -> HeadShapley:
    r"""Share out among the heads what they take off the loss together.

    The Shapley value of a head is what it takes off the mean loss when it is added to those before it in a random
    order, :math:`\phi_h = E\,[v(S \cup h) - v(S)]` with :math:`v = -L`, all others being off. Above 0 the head is of
    use. Two heads that stand in for one another share what they do, where leaving out one alone finds nothing.

    Costs a forward a head, batch and permutation, and a head's standard error falls with the root of their number:
    choose some heads, or few samples. A permutation is broken off once what is left to gain is below ``truncation`` of
    the whole, and what follows counts as 0; ``gap`` says what that left over.

    Args:
        model: The model.
        batches: Whatever ``loss`` understands. Read once and kept: every run takes all of them.
        loss: Runs the model on a batch: ``loss(model, batch)`` returns one loss a sample, ``(samples,)``; NaN for one
            that does not count.
        heads: Heads ``(layer, head)`` that play, where a layer is given by its name or its number; all others stay on.
            ``None`` takes all.
        permutations: Number of random orders.
        truncation: Share of ``v(all) - v(none)`` that may be left to gain; 0 runs every permutation to its end.
        seed: Of a generator of its own.
        layers: Names or glob patterns of attention modules; ``None`` takes all.
        seconds: Time after which no run is begun. A permutation that is not completed is thrown away; without one,
            values are NaN. ``None``: as long as it takes.
        progress: Called with the share that is done, from 0 to 1; ``True`` draws a bar on standard error.

    Raises:
        RuntimeError: If the losses with all heads off are those without, or two runs of the unchanged model differ as
            much.
        ValueError: If a number is out of range, ``loss`` returns something else or nothing but NaN, there is no batch,
            or ``heads`` or ``layers`` name what is not there.

    Example:
        >>> model = nn.MultiheadAttention(4, num_heads=2, batch_first=True)
        >>> def loss(model, tokens):
        ...     return model(tokens, tokens, tokens)[0].square().mean(dim=(1, 2))
        >>> found = head_shapley(model, [torch.randn(8, 3, 4)], loss, permutations=4, truncation=0)
        >>> abs(float(found.value.sum()) - (found.all_off - found.all_on)) < 1e-6
        True

    References:
        Ghorbani and Zou, "Data Shapley", 2019, algorithm 1 (truncated permutation sampling; there of data). Held and
        Yang, "Shapley Head Pruning", 2022.
    """
    at_least("permutations", permutations, 1)
    in_range("truncation", truncation, 0.0, 1.0)
    experiment, budget = HeadExperiment(model, batches, loss, layers), Budget(seconds, progress)
    with experiment.open():
        if heads is None:
            experiment.find_all(budget)
        players = experiment.table.chosen(heads)
        if not players or len(set(players)) < len(players):
            raise ValueError(f"`heads` must hold some heads, each once, got {heads!r}.")
        check_heads(experiment, budget)
        game = _Game(experiment, budget, players, truncation)
        game.play(permutations, torch.Generator().manual_seed(seed))
        return game.result()


class _Game:
    """Permutations of heads that are added one after the other."""

    def __init__(self, experiment: HeadExperiment, budget: Budget, players: list[int], truncation: float) -> None:
        self._experiment, self._budget, self._players, self._truncation = experiment, budget, players, truncation
        self._all_on = self._all_off = torch.nan
        self._gains = SampleMoments(len(experiment.table))  # over permutations, not samples
        self._done = self._cut = 0

    def play(self, permutations: int, generator: torch.Generator) -> None:
        """Play until all permutations are done or the time is up."""
        self._budget.plan((permutations * len(self._players) + 2) * len(self._experiment.batches))
        ends = self._loss(frozenset()), self._loss(frozenset(self._players))
        self._all_on, self._all_off = (torch.nan if end is None else end for end in ends)
        if None in ends:
            return
        for _ in range(permutations):
            drawn = torch.randperm(len(self._players), generator=generator).tolist()
            gains = self._added([self._players[place] for place in drawn])
            if gains is None:
                return
            self._gains.add(gains[:, None])
            self._done += 1

    def result(self) -> HeadShapley:
        """Conclude."""
        table, mean = self._experiment.table, self._gains.mean()
        return HeadShapley(
            layer_names=table.names,
            value=table.spread(mean),
            standard_error=table.spread(self._gains.standard_error()),
            gap=self._all_off - self._all_on - float(mean[self._players].sum()),
            all_on=self._all_on,
            all_off=self._all_off,
            permutations=self._done,
            truncated=self._cut / max(1, self._done * len(self._players)),
            is_complete=self._budget.was_enough,
        )

    def _added(self, order: list[int]) -> Tensor | None:
        """Return what each head of one order takes off the loss, ``(all heads,)``; ``None`` if the time was up."""
        gains = torch.full((len(self._experiment.table),), torch.nan, dtype=torch.float64)
        off, before, cut = set(self._players), self._all_off, 0
        tolerance = self._truncation * abs(self._all_off - self._all_on)
        for place, head in enumerate(order):
            if place and abs(before - self._all_on) < tolerance:
                cut = len(order) - place
                gains[order[place:]] = 0.0
                break
            off.remove(head)
            after = self._loss(frozenset(off)) if off else self._known(self._all_on)
            if after is None:
                return None
            gains[head], before = before - after, after
        self._budget.step(cut * len(self._experiment.batches))
        self._cut += cut
        return gains

    def _loss(self, off: frozenset[int]) -> float | None:
        """Return the mean loss over all samples with some heads off; ``None`` if the time was up."""
        losses = []
        for batch in self._experiment.batches:
            if self._budget.is_spent:
                return None
            losses.append(self._experiment.losses(batch, off))
            self._budget.step()
        return float(torch.cat(losses).nanmean())

    def _known(self, loss: float) -> float:
        """Return a loss that needs no run."""
        self._budget.step(len(self._experiment.batches))
        return loss
