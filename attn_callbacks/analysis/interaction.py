"""Interaction of heads: what two of them together do to the loss beyond what each does alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from attn_callbacks._checks import at_least, one_of
from attn_callbacks._plain import plain
from attn_callbacks.analysis._budget import Budget, Progress
from attn_callbacks.analysis._experiment import HeadExperiment
from attn_callbacks.analysis._pair_runs import estimated_pairs, exact_pairs
from attn_callbacks.analysis._table import Head, HeadLike, HeadTable

__all__ = ["HeadInteractions", "HeadPair", "head_interactions"]


class HeadPair(NamedTuple):
    """Two heads and what they do to one another.

    Args:
        first: ``(layer, head)``.
        second: Likewise.
        interaction: Above 0 redundant, below 0 synergetic.
        standard_error: Of ``interaction``, over samples.
    """

    first: Head
    second: Head
    interaction: float
    standard_error: float


@dataclass(frozen=True, eq=False)
class HeadInteractions:
    """What `head_interactions` found.

    Args:
        heads: Name of each row and column, ``(layer, head)``.
        layer_names: Name of each layer.
        interaction: Mean over samples, symmetric ``(heads, heads)``; NaN on the diagonal and where nothing was
            measured. Above 0 redundant, below 0 synergetic.
        standard_error: Of ``interaction``, over samples.
        samples: Number of samples that each pair was measured on. int64.
        change: How much the loss rises when a head alone is off, ``(layers, heads)``, exact.
        change_error: Of ``change``.
        loss: Mean loss with all heads.
        method: ``"exact"`` or ``"estimated"``.
        is_complete: Everything was measured before the time was up.
    """

    heads: tuple[Head, ...]
    layer_names: tuple[str, ...]
    interaction: Tensor
    standard_error: Tensor
    samples: Tensor
    change: Tensor
    change_error: Tensor
    loss: float
    method: str
    is_complete: bool

    def redundant(self, count: int = 10) -> tuple[HeadPair, ...]:
        """Return the pairs that most stand in for one another, the strongest first."""
        return self._strongest(count, 1)

    def synergetic(self, count: int = 10) -> tuple[HeadPair, ...]:
        """Return the pairs that most need one another, the strongest first."""
        return self._strongest(count, -1)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, lists and strings; NaN becomes ``None``."""
        return {name: plain(value) for name, value in vars(self).items()}

    def _strongest(self, count: int, sign: int) -> tuple[HeadPair, ...]:
        values = sign * self.interaction.triu(diagonal=1).nan_to_num()
        found = values.flatten().topk(min(at_least("count", count, 1), values.numel()))
        places = [divmod(place, len(self.heads)) for place in found.indices[found.values > 0].tolist()]
        return tuple(
            HeadPair(
                self.heads[row],
                self.heads[column],
                float(self.interaction[row, column]),
                float(self.standard_error[row, column]),
            )
            for row, column in places
        )


def head_interactions(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    pairs: Sequence[tuple[HeadLike, HeadLike]] | None = None,
    value: Literal["zero", "mean"] = "zero",
    layers: Sequence[str] | None = None,
    *,
    seconds: float | None = None,
    progress: Progress = False,
) -> HeadInteractions:
    r"""Measure :math:`I(h, k) = \Delta(\{h, k\}) - \Delta(\{h\}) - \Delta(\{k\})` on the loss.

    Above 0 the two are **redundant**: each covers for the other, and only without both the loss rises. Below 0 they are
    **synergetic**: one is of no use without the other, so that the second loss is less than the first.

    Chosen ``pairs`` are measured exactly: a forward for each of them and for each of their heads. For all pairs that
    would be a forward for each of heads² / 2; ``pairs=None`` takes a forward and a backward a head instead, from its
    layer on: with :math:`G_k` the gradient of a gate on ``k``, :math:`I(h, k) \approx G_k(\{\}) - G_k(\{h\})`. This is
    exact in ``h``, the head that runs first, and first order in ``k``: what is left out is
    :math:`\frac{1}{2}[\partial_k^2 L(\{h\}) - \partial_k^2 L(\{\})]` and higher terms, nothing where the loss is linear
    in a gate. Of two heads of one layer it is the mean of both orders. Measure what matters to you again, exactly.

    Standard errors are over samples, each of which is compared with itself. With many pairs, some come out far from 0
    by chance: look at the largest ones again on other samples.

    Args:
        model: The model.
        batches: Whatever ``loss`` understands. Read once and kept: pass as many as shall be used.
        loss: Runs the model on a batch: ``loss(model, batch)`` returns one loss a sample, ``(samples,)``; NaN for one
            that does not count. For ``pairs=None`` with a graph.
        pairs: Pairs of heads, each ``(layer, head)``, where a layer is given by its name or its number; ``None``
            estimates all. A pair that comes twice, in whatever order, is measured once.
        value: For ``pairs``, what takes the place of a head's output, as in :func:`ablate_heads`.
        layers: Names or glob patterns of attention modules; ``None`` takes all.
        seconds: Time after which nothing more is begun; what was not measured is NaN. ``None``: all is measured.
        progress: Called with the share that is done, from 0 to 1; ``True`` draws a bar on standard error.

    Raises:
        RuntimeError: If the losses with all heads off are those without, two runs of the unchanged model differ as
            much, or no gradient reaches a head.
        ValueError: If ``loss`` returns something else or nothing but NaN, there is no batch, ``pairs`` is empty,
            ``pairs`` or ``layers`` name what is not there, or ``value="mean"`` comes without ``pairs``.

    Example:
        >>> import torch
        >>> model = nn.MultiheadAttention(4, num_heads=2, batch_first=True)
        >>> def loss(model, tokens):
        ...     return model(tokens, tokens, tokens)[0].square().mean(dim=(1, 2))
        >>> found = head_interactions(model, [torch.randn(8, 3, 4)], loss)
        >>> found.heads, tuple(found.interaction.shape)
        ((('MultiheadAttention', 0), ('MultiheadAttention', 1)), (2, 2))

    References:
        Grabisch and Roubens, "An axiomatic approach to the concept of interaction among players in cooperative games",
        1999 (of which this is the difference at one context: all other heads on).
    """
    one_of("value", value, ("zero", "mean"))
    if pairs is None and value == "mean":
        raise ValueError("`value='mean'` needs `pairs`: gates, by which all pairs are estimated, lead to zero.")
    experiment, budget = HeadExperiment(model, batches, loss, layers), Budget(seconds, progress)
    with experiment.open():
        if pairs is None:
            experiment.find_all(budget)
            sums = estimated_pairs(experiment, budget)
        else:
            sums = exact_pairs(experiment, budget, _numbers(experiment.table, pairs), mean=value == "mean")
        table = experiment.table
        return HeadInteractions(
            heads=table.heads,
            layer_names=table.names,
            interaction=sums.pairs.mean(),
            standard_error=sums.pairs.standard_error(),
            samples=sums.pairs.samples,
            change=table.spread(sums.alone.mean()),
            change_error=table.spread(sums.alone.standard_error()),
            loss=float(sums.losses.mean()),
            method="estimated" if pairs is None else "exact",
            is_complete=budget.was_enough,
        )


def _numbers(table: HeadTable, pairs: Sequence[tuple[HeadLike, HeadLike]]) -> list[tuple[int, int]]:
    if not pairs:
        raise ValueError("`pairs` holds no pair. Pass None for all.")
    found: dict[tuple[int, int], None] = {}
    for pair in pairs:
        numbers = sorted({table.number(head) for head in pair})
        if len(pair) != 2 or len(numbers) != 2:
            raise ValueError(f"`pairs` must hold pairs of two heads, got {pair!r}.")
        found[numbers[0], numbers[1]] = None
    return list(found)
