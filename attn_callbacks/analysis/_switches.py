"""What is done to the output of heads in one run: taken away, given gates, or only looked at."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attn_callbacks.capture import AttentionCall, call_name
from attn_callbacks.functional.importance import gate_gradient

__all__ = ["Gates", "HeadMeans", "Removal", "Size"]

Means = Mapping[str, Tensor]


class Removal:
    """Puts zeros, or means, in the place of what some heads put out.

    Args:
        off: The heads of each layer that are taken away.
        means: By layer, what a head is replaced with, ``(heads, head_dim)``; ``None``: zeros.
        labels: Names of the calls in the order in which they come; ``None`` reads them off the calls.
    """

    def __init__(
        self, off: Mapping[str, Sequence[int]], means: Means | None = None, labels: Sequence[str] | None = None
    ) -> None:
        self._off, self._means = off, means
        self._labels: Iterator[str] | None = None if labels is None else iter(labels)

    def __call__(self, call: AttentionCall) -> Tensor | None:
        name = call_name(call) if self._labels is None else next(self._labels, "")
        return self.removed(name, call.output)

    def removed(self, name: str, output: Tensor | None) -> Tensor | None:
        """Return the output without the heads of a layer; ``None`` if nothing is taken from it."""
        heads = self._off.get(name)
        if not heads or output is None:
            return None
        output = output.clone()
        if self._means is None:
            output[:, heads] = 0.0
            return output
        means = self._means[name]
        if means.shape[-1] != output.shape[-1]:
            raise ValueError(_no_mean(name))
        output[:, heads] = means[heads].to(output)[:, None]
        return output


class Gates:
    """Gives heads of every sample a gate of one, and knows the gradients of these gates after a backward.

    Args:
        wanted: Tells of a name and its call whether its heads get gates.
        removal: Takes heads away before.
        look: Called with each of these calls before anything is done.
        begin: Layers, of which the first one that runs is the first to get gates; none: all get some.
        labels: Names of the calls in the order in which they come; ``None`` reads them off the calls.
    """

    def __init__(
        self,
        wanted: Callable[[str, AttentionCall], bool],
        removal: Removal,
        look: Callable[[str, AttentionCall], None] | None = None,
        begin: Collection[str] = (),
        labels: Sequence[str] | None = None,
    ) -> None:
        self.heads: dict[str, int] = {}
        self._wanted, self._removal, self._look = wanted, removal, look
        self._labels: Iterator[str] | None = None if labels is None else iter(labels)
        self._begin, self._begun = begin, not begin
        self._gates: list[tuple[str, Tensor]] = []

    def __call__(self, call: AttentionCall) -> Tensor | None:
        name, output = call_name(call) if self._labels is None else next(self._labels, ""), call.output
        self._begun = self._begun or name in self._begin
        if output is None or not self._begun or not self._wanted(name, call):
            return None
        self.heads.setdefault(name, call.shape[1])
        if self._look is not None:
            self._look(name, call.detach())
        removed = self._removal.removed(name, output)
        gate = torch.ones(call.shape[:2], device=output.device, requires_grad=True)
        self._gates.append((name, gate))
        gated: Tensor = _Gate.apply(output if removed is None else removed, gate)  # type: ignore[no-untyped-call]
        return gated

    def gradients(self, losses: Tensor) -> dict[str, Tensor]:
        """Differentiate the sum of ``losses (samples,)``: ``(samples, heads)`` of each layer that a gradient reached.

        Windows and crops of one sample are added up, as are several calls under one name.

        Raises:
            ValueError: If a layer computes on less maps than there are samples.
        """
        gates = [gate for _, gate in self._gates]
        found: dict[str, Tensor] = {}
        gradients = torch.autograd.grad(losses.sum(), gates, allow_unused=True) if gates else ()
        for (name, _), gradient in zip(self._gates, gradients, strict=True):
            if gradient is not None:
                own = by_sample(name, gradient, len(losses)).double().cpu()
                found[name] = found[name] + own if name in found else own
        return found


def by_sample(name: str, values: Tensor, samples: int) -> Tensor:
    """Add up the maps of each sample, ``(maps, heads)`` to ``(samples, heads)``.

    Raises:
        ValueError: If their number is no multiple of that of the samples.
    """
    if len(values) % samples:
        raise ValueError(
            f"{name!r} attends on {len(values)} maps for {samples} losses, so that no loss has maps of its own. "
            "Let `loss` return one loss a sample, or leave this one out of `layers`."
        )
    summed: Tensor = values.unflatten(0, (samples, -1)).sum(dim=1)
    return summed


class HeadMeans:
    """Adds up what heads put out, over the valid tokens of all samples."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def __call__(self, call: AttentionCall) -> None:
        name, output = call_name(call), call.output
        if output is None:
            return
        if call.query is None and _are_weights(output, call.shape[3]):
            raise ValueError(_no_mean(name))
        valid = call.query_valid
        total = output.double().where(valid[:, None, :, None], 0.0).sum(dim=(0, 2))  # padded rows may be NaN
        if name in self._sums and self._sums[name].shape != total.shape:
            raise ValueError(_no_mean(name))
        self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._counts[name] = self._counts.get(name, valid.new_zeros((), dtype=torch.long)) + valid.sum()

    def means(self) -> dict[str, Tensor]:
        """Return the mean of each layer, ``(heads, head_dim)``, float64."""
        return {name: total / self._counts[name].clamp_min(1) for name, total in self._sums.items()}


class Size:
    """Notes the names of calls, their numbers of heads, and how many they are.

    Args:
        wanted: Tells of a call whether it is noted; ``None``: all.
    """

    def __init__(self, wanted: Callable[[AttentionCall], bool] | None = None) -> None:
        self.heads: dict[str, int] = {}
        self.calls = 0
        self._wanted = wanted

    def __call__(self, call: AttentionCall) -> None:
        if self._wanted is not None and not self._wanted(call):
            return
        self.calls += 1
        self.heads.setdefault(call_name(call), call.shape[1])


class _Gate(torch.autograd.Function):
    """A factor of one on each head, whose gradient is taken in float32."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(output)
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        (output,) = ctx.saved_tensors
        return gradient, gate_gradient(output, gradient).float()


def _are_weights(output: Tensor, keys: int) -> bool:
    """The model mixes its values in a way that leaves only its weights to be seen."""
    if output.shape[-1] != keys or bool((output < 0).any()):
        return False
    sums = output.double().sum(dim=-1)
    return bool(((sums - 1).abs().lt(1e-2) | sums.eq(0)).all())


def _no_mean(name: str) -> str:
    return (
        f"{name!r} mixes its values by an einsum of its own, so that only its weights are seen, which have no mean "
        "over sequences of different lengths. Use value='zero'."
    )
