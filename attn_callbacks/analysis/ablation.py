"""Ablation: the loss with a head off against the loss with all heads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attn_callbacks._checks import one_of
from attn_callbacks._plain import plain
from attn_callbacks.analysis._ablated_runs import AblatedRuns
from attn_callbacks.analysis._budget import Budget, Progress
from attn_callbacks.analysis._experiment import HeadExperiment
from attn_callbacks.analysis._moments import SampleMoments
from attn_callbacks.analysis._table import Head, HeadLike, HeadTable

__all__ = ["HeadAblation", "ablate_heads"]


@dataclass(frozen=True, eq=False)
class HeadAblation:
    """What `ablate_heads` found; tensors are ``(layers, heads)`` or ``(sets,)``, NaN where nothing was measured.

    Args:
        layer_names: Name of each layer; one that is called several times in a forward has a name for each call.
        change: Mean over samples of how much the loss rises when the head alone is off.
        standard_error: Of ``change``; each sample is compared with itself.
        samples: Number of samples that each head was measured on. int64.
        sets: Heads that were off together.
        set_change: Of each set, how much the loss rises when all its heads are off.
        set_error: Of ``set_change``.
        loss: Mean loss with all heads.
        value: What took the place of a head's output.
        reused_prefix: Runs began at the layer that changes. ``False`` if that gave other losses in some batch, or if
            there were too few runs to make sure.
        is_complete: Everything was measured before the time was up.
    """

    layer_names: tuple[str, ...]
    change: Tensor
    standard_error: Tensor
    samples: Tensor
    sets: tuple[tuple[Head, ...], ...]
    set_change: Tensor
    set_error: Tensor
    loss: float
    value: str
    reused_prefix: bool
    is_complete: bool

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, lists and strings; NaN becomes ``None``."""
        return {name: plain(value) for name, value in vars(self).items()}


def ablate_heads(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    heads: Sequence[HeadLike | Sequence[HeadLike]] | None = None,
    value: Literal["zero", "mean"] = "zero",
    layers: Sequence[str] | None = None,
    *,
    seconds: float | None = None,
    progress: Progress = False,
) -> HeadAblation:
    r"""Measure how much the loss rises when a head is taken away, :math:`\Delta_h = L(\{h\}) - L(\{\})`.

    Exact, at the head's output before the output projection, whose bias stays; no weight is touched. Under grouped
    queries each query head is one. Above 0 the head is of use. Two heads that stand in for one another both come out
    near 0: see :func:`head_interactions` before taking several.

    Costs a forward a head and batch. What modules returned before the first changed layer is used again, which halves
    it where every head of a deep stack is taken in turn, and takes the memory of a forward's residual stream and
    projections. Whether that gives the same losses is checked in each batch, with a run for each layer; if not, runs of
    that batch are whole ones.
    A loss need not have a gradient: errors of a classifier will do.

    Args:
        model: The model.
        batches: Whatever ``loss`` understands. Read once and kept: pass as many as shall be used.
        loss: Runs the model on a batch: ``loss(model, batch)`` returns one loss a sample, ``(samples,)``; NaN for one
            that does not count.
        heads: Heads ``(layer, head)``, and lists of heads that are off together; ``None`` takes each one alone. A layer
            is given by its name or its number, among those that run in the first batch.
        value: ``"zero"``, or ``"mean"``: the mean of the head's output over all valid tokens of all ``batches``, for
            each channel, which costs one more forward a batch. Zeros are nothing that a network has seen in training;
            the mean takes away what the head says about this input only.
        layers: Names or glob patterns of attention modules; ``None`` takes all.
        seconds: Time after which nothing more is begun; what was not measured is NaN. ``None``: all is measured.
        progress: Called with the share that is done, from 0 to 1; ``True`` draws a bar on standard error.

    Raises:
        RuntimeError: If the losses with all heads off are those without, or two runs of the unchanged model differ as
            much: then nothing is known about single heads.
        ValueError: If ``loss`` returns something else or nothing but NaN, there is no batch, ``heads`` or ``layers``
            name what is not there, or a model that mixes its values by an einsum of its own is asked for a mean.

    Example:
        >>> model = nn.MultiheadAttention(4, num_heads=2, batch_first=True)
        >>> def loss(model, tokens):
        ...     return model(tokens, tokens, tokens)[0].square().mean(dim=(1, 2))
        >>> name, tokens = "MultiheadAttention", torch.randn(8, 3, 4)
        >>> found = ablate_heads(model, [tokens], loss, heads=[(name, 0), [(name, 0), (name, 1)]])
        >>> found.change.isnan().tolist(), len(found.set_change)
        ([[False, True]], 1)

    References:
        Michel, Levy and Neubig, "Are Sixteen Heads Really Better than One?", 2019, section 3.
    """
    one_of("value", value, ("zero", "mean"))
    experiment, budget = HeadExperiment(model, batches, loss, layers), Budget(seconds, progress)
    with experiment.open():
        if heads is None:
            experiment.find_all(budget)
        work = _Work(experiment, budget, _sets(experiment.table, heads))
        for index, change in work.runs.changes(mean=value == "mean"):
            work.changes.add(change, index)
        return work.result(heads is None, value)


class _Work:
    """All runs of one ablation."""

    def __init__(self, experiment: HeadExperiment, budget: Budget, sets: list[tuple[int, ...]]) -> None:
        self._table, self._budget, self._sets = experiment.table, budget, sets
        self.runs, self.changes = AblatedRuns(experiment, budget, sets), SampleMoments(len(sets))

    def result(self, is_plain: bool, value: str) -> HeadAblation:
        """Conclude; ``is_plain`` means that each head was off alone."""
        table, size = self._table, len(self._table)
        mean, error, count = self.changes.mean(), self.changes.standard_error(), self.changes.samples
        alone = [index for index, off in enumerate(self._sets) if is_plain or len(off) == 1]
        places = torch.tensor([self._sets[index][0] for index in alone], dtype=torch.long)
        nothing = torch.full((size,), torch.nan, dtype=torch.float64)
        together = [index for index, off in enumerate(self._sets) if len(off) > 1]
        return HeadAblation(
            layer_names=table.names,
            change=table.spread(nothing.index_put((places,), mean[alone])),
            standard_error=table.spread(nothing.index_put((places,), error[alone])),
            samples=table.spread(torch.zeros(size, dtype=torch.long).index_put((places,), count[alone]), missing=0),
            sets=tuple(tuple(table.heads[number] for number in self._sets[index]) for index in together),
            set_change=mean[together],
            set_error=error[together],
            loss=float(self.runs.losses.mean()),
            value=value,
            reused_prefix=self.runs.reused,
            is_complete=self._budget.was_enough,
        )


def _sets(table: HeadTable, heads: Sequence[HeadLike | Sequence[HeadLike]] | None) -> list[tuple[int, ...]]:
    if heads is None:
        return [(number,) for number in range(len(table))]
    if not heads:
        raise ValueError("`heads` holds no head. Pass None for all.")
    return [_numbers(table, each) for each in heads]


def _numbers(table: HeadTable, heads: Any) -> tuple[int, ...]:
    parts = list(heads) if isinstance(heads, Iterable) and not isinstance(heads, str) else [heads]
    if not parts:
        raise ValueError("`heads` has an empty set. Leave it out: with nothing off nothing changes.")
    is_set = all(isinstance(part, (tuple, list)) for part in parts)
    return tuple(sorted({table.number(head) for head in (parts if is_set else [heads])}))
