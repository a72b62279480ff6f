"""Importance of heads from gate gradients: one forward and backward for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attn_callbacks._plain import plain
from attn_callbacks.analysis._budget import Budget, Progress
from attn_callbacks.analysis._confidence import Confidence
from attn_callbacks.analysis._doubts import ALL_NAN, NoLossError, check_reached
from attn_callbacks.analysis._experiment import HeadExperiment
from attn_callbacks.analysis._moments import SampleMoments
from attn_callbacks.analysis._table import HeadTable

__all__ = ["GateImportance", "head_importance"]


@dataclass(frozen=True, eq=False)
class GateImportance:
    """What `head_importance` found; tensors are ``(layers, heads)``, NaN where a layer has fewer heads.

    Args:
        layer_names: Name of each layer; one that is called several times in a forward has a name for each call.
        importance: Mean over samples of the size of the gate gradient. NaN where no gradient reached the layer.
        standard_error: Of ``importance``, over samples.
        signed: Mean over samples of the gate gradient with its sign.
        signed_error: Of ``signed``.
        confidence: Mean over valid queries, then samples, of the largest weight of a row.
        confidence_error: Of ``confidence``.
        loss: Mean loss.
        samples: Number of samples looked at.
        is_complete: All batches were looked at before the time was up.
    """

    layer_names: tuple[str, ...]
    importance: Tensor
    standard_error: Tensor
    signed: Tensor
    signed_error: Tensor
    confidence: Tensor
    confidence_error: Tensor
    loss: float
    samples: int
    is_complete: bool

    @property
    def change(self) -> Tensor:
        """First-order estimate of how much the mean loss rises when a head is taken away, ``(layers, heads)``."""
        return -self.signed

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, lists and strings; NaN becomes ``None``."""
        return {name: plain(value) for name, value in {**vars(self), "change": self.change}.items()}


def head_importance(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    layers: Sequence[str] | None = None,
    *,
    seconds: float | None = None,
    progress: Progress = False,
) -> GateImportance:
    r"""Measure how strongly the loss of each sample answers to a gate on each head.

    A gate :math:`\xi_h = 1` on the output :math:`z_h` of a head has the gradient :math:`\langle z_h, dL/dz_h\rangle`.
    Importance is the mean over samples of its size: unlike the mean with signs it does not vanish where a head helps
    one sample and harms the next. Minus the mean with signs estimates, to first order, what :func:`ablate_heads`
    measures with a forward a head. Confidence stands beside it: a head can be sure of where it looks without mattering.

    Costs one forward and one backward to the activations a batch, whatever the number of heads. Runs in evaluation;
    weights need not require gradients, and none gets one. Modules, flags and random generators are as before
    afterwards.

    The backward is that of the sum of all losses, which gives each sample its own gradient as long as samples do not
    meet in the network: batch normalisation in evaluation is fine, without running statistics it is not.
    Runs in this process alone; on several processes, call it on one of them with the module inside the wrapper.

    Args:
        model: The model.
        batches: Whatever ``loss`` understands. Read once and kept: pass as many as shall be used.
        loss: Runs the model on a batch: ``loss(model, batch)`` returns one loss a sample, ``(samples,)``; NaN for one
            that does not count. With a graph.
        layers: Names or glob patterns of attention modules; ``None`` takes all.
        seconds: Time after which no further batch is begun; ``None``: all are looked at.
        progress: Called with the share that is done, from 0 to 1; ``True`` draws a bar on standard error.

    Raises:
        RuntimeError: If no gradient reaches any head.
        ValueError: If ``loss`` returns something else, nothing but NaN or values without a graph, if there is no batch,
            or if an entry of ``layers`` matches nothing.

    Example:
        >>> model = nn.MultiheadAttention(4, num_heads=2, batch_first=True)
        >>> def loss(model, tokens):
        ...     return model(tokens, tokens, tokens)[0].square().mean(dim=(1, 2))
        >>> found = head_importance(model, [torch.randn(8, 3, 4)], loss)
        >>> found.layer_names, tuple(found.importance.shape), found.samples
        (('MultiheadAttention',), (1, 2), 8)

    References:
        Michel, Levy and Neubig, "Are Sixteen Heads Really Better than One?", 2019, equation 4. Voita et al., "Analyzing
        Multi-Head Self-Attention", 2019 (confidence; there without the end-of-sentence key).
    """
    experiment, budget = HeadExperiment(model, batches, loss, layers), Budget(seconds, progress)
    with experiment.open(find=False):
        budget.plan(len(experiment.batches))
        sums = _Sums()
        for batch in experiment.batches:
            if budget.is_spent and not budget.is_untouched:
                break
            sure = Confidence()
            losses, gradients = experiment.gates(batch, look=sure, find=True)
            sums.add(losses, experiment.table, gradients, sure)
            budget.step()
        return sums.result(experiment.table, is_complete=budget.was_enough)


class _Sums:
    """What is added up over samples."""

    def __init__(self) -> None:
        self._losses = SampleMoments()
        self._heads: dict[str, tuple[SampleMoments, ...]] = {}  # by layer: later batches may show others

    def add(self, losses: Tensor, table: HeadTable, gradients: Tensor, sure: Confidence) -> None:
        """Add losses ``(samples,)``, gate gradients ``(all heads, samples)`` and confidence."""
        self._losses.add(losses)
        sizes = list(table.sizes.values())
        parts = (gradients.abs(), gradients, sure.read(table.sizes, len(losses)))
        for name, *layer in zip(table.names, *(values.split(sizes) for values in parts), strict=True):
            own = self._heads.setdefault(name, tuple(SampleMoments(table.sizes[name]) for _ in parts))
            for moments, values in zip(own, layer, strict=True):
                moments.add(values)

    def result(self, table: HeadTable, *, is_complete: bool) -> GateImportance:
        """Conclude."""
        if not int(self._losses.samples):
            raise NoLossError(ALL_NAN)
        (sizes, size_error), (signed, signed_error), (sure, sure_error) = (self._of(table, n) for n in range(3))
        check_reached(sizes)
        return GateImportance(
            layer_names=table.names,
            importance=sizes,
            standard_error=size_error,
            signed=signed,
            signed_error=signed_error,
            confidence=sure,
            confidence_error=sure_error,
            loss=float(self._losses.mean()),
            samples=int(self._losses.samples),
            is_complete=is_complete,
        )

    def _of(self, table: HeadTable, number: int) -> tuple[Tensor, Tensor]:
        """Return mean and standard error of one quantity, ``(layers, heads)``."""
        own = [self._heads[name][number] for name in table.names]
        means, errors = [each.mean() for each in own], [each.standard_error() for each in own]
        return table.spread(torch.cat(means)), table.spread(torch.cat(errors))
