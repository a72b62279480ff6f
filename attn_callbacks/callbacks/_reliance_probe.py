"""Functional reliance: how much accuracy is lost when a token set holds what it holds in another sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attn_callbacks._lightning import rank_zero_warn
from attn_callbacks.batch import BatchSchema
from attn_callbacks.callbacks._forward import ForwardCall
from attn_callbacks.callbacks._regions import region_on
from attn_callbacks.callbacks._substitute import holds
from attn_callbacks.functional.exchange import RegionContents, join_contents, paste_region, region_contents

__all__ = ["Probed", "RelianceProbe", "class_scores"]


@dataclass(frozen=True)
class Probed:
    """One batch with a token set exchanged.

    Args:
        name: Name of the set.
        before: Logits of the batch as it is.
        after: Logits with the set exchanged.
        target: Class of each sample.
        present: Samples that hold a token of the set, and got another sample's.
    """

    name: str
    before: Tensor
    after: Tensor
    target: Tensor
    present: Tensor


@dataclass
class _Kept:
    """A batch that waits for the end of the validation: its call, and where its sets lie."""

    call: ForwardCall
    inputs: Tensor
    target: Tensor
    predicted: Tensor
    regions: dict[str, Tensor]


class RelianceProbe:
    """Keeps the inputs of some validation batches, and runs the network on them again once all have been seen.

    Contents are exchanged over all kept batches, since validation data is often sorted by class: within a batch, they
    would come from the same class. On several processes, each exchanges among its own batches.

    Args:
        module: The module that is validated.
        schema: Where a batch has what.
        names: Names of the token sets.
    """

    def __init__(self, module: nn.Module, schema: BatchSchema, names: Sequence[str]) -> None:
        self._module, self._schema, self._names = module, schema, tuple(names)
        self._kept: list[_Kept] = []
        self._call: ForwardCall | None = None
        self._told = False

    @contextmanager
    def watch(self, batch: Any) -> Iterator[None]:
        """Watch the step of a batch that is to be kept."""
        self._call = None
        inputs = self._schema.read("inputs", batch)
        if not isinstance(inputs, Tensor) or not holds(batch, inputs):
            yield
            return
        call = ForwardCall(self._module, inputs, trace=False)
        with call.watch():
            yield
        self._call = call

    def keep(self, batch: Any, predicted: Tensor) -> None:
        """Keep the batch that was watched, if a set is marked in it.

        Args:
            batch: The batch.
            predicted: What its step predicted, ``(samples,)``.
        """
        call, self._call = self._call, None
        if call is None:
            return
        inputs, target = self._schema.read("inputs", batch), self._schema.read("target", batch)
        marked = {name: mask for name in self._names if (mask := self._schema.flags(name, batch)) is not None}
        regions = {name: region_on(mask, inputs) for name, mask in marked.items()}
        if regions and target is not None:
            call.outputs.clear()
            if not call.seen:
                self._tell()
                return
            target = torch.as_tensor(target, device=inputs.device)
            self._kept.append(_Kept(call, inputs, target, predicted, regions))

    def run(self, generator: torch.Generator, around: Callable[[], AbstractContextManager[Any]]) -> Iterator[Probed]:
        """Run the network again on what was kept, without gradients, and forget it.

        Args:
            generator: Draws who gives to whom; on the CPU.
            around: What is entered around each call, such as autocast.
        """
        kept, self._kept = self._kept, []
        before: dict[int, Tensor | None] = {}  # by batch; `None` where what ran again is not what predicts
        for name in self._names:
            marked = [entry for entry in kept if name in entry.regions]
            if not marked:
                continue
            pool = join_contents([region_contents(entry.inputs, entry.regions[name]) for entry in marked])
            start = 0
            for entry in marked:
                own = slice(start, start + len(entry.inputs))
                start = own.stop
                donor, found = _donors(pool, own, generator)
                mixed = paste_region(entry.inputs, entry.regions[name], pool, donor)
                # a network that draws numbers in evaluation must not train on other ones for being looked at
                with torch.random.fork_rng(_devices(entry.inputs)), torch.no_grad(), around():
                    if id(entry) not in before:
                        before[id(entry)] = self._confirmed(entry)
                    first = before[id(entry)]
                    after = None if first is None else self._logits(entry.call.again(mixed))
                if first is not None and after is not None:
                    yield Probed(name, first, after, entry.target, (pool.lengths[own] > 0) & found)

    def _confirmed(self, entry: _Kept) -> Tensor | None:
        """Return the logits of a batch as it is, if they predict what its step did."""
        logits = self._logits(entry.call.again(entry.inputs))
        same = logits is not None and len(logits) == len(entry.predicted)
        if logits is None or not same or (class_scores(logits).argmax(dim=1) == entry.predicted).double().mean() < 0.9:
            self._tell()
            return None
        return logits

    def _tell(self) -> None:
        if not self._told:
            self._told = True
            rank_zero_warn(
                "`BiasMonitor` cannot measure reliance: no call of the module, or of a network directly below it, "
                "leads from the `inputs` of a validation batch to the logits. Hand them over unchanged, as in "
                "`self(inputs)`, or say what they are: BatchSchema(inputs=...)."
            )

    def _logits(self, output: Any) -> Tensor | None:
        return self._schema.forward_logits([output])


def class_scores(logits: Tensor) -> Tensor:
    """Return ``(samples, classes)``; one logit a sample is a binary classifier.

    Raises:
        ValueError: If the logits have another shape.
    """
    if logits.ndim == 1 or (logits.ndim == 2 and logits.shape[-1] == 1):
        positive = logits.reshape(-1, 1)
        return torch.cat([torch.zeros_like(positive), positive], dim=1)
    if logits.ndim != 2:
        raise ValueError(f"`logits` must have shape (samples, classes), got {tuple(logits.shape)}.")
    return logits


def _devices(inputs: Tensor) -> list[torch.device]:
    return [inputs.device] if inputs.device.type == "cuda" else []


def _donors(pool: RegionContents, own: slice, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw for each sample of ``own`` another sample with a region, and say for which there was one."""
    givers = (pool.lengths > 0).nonzero()[:, 0].cpu()
    samples = torch.arange(own.start, own.stop)
    if len(givers) < 2:
        return samples.to(pool.lengths.device), torch.zeros(len(samples), dtype=torch.bool, device=pool.lengths.device)
    place = torch.searchsorted(givers, samples)  # where a giver itself stands among the givers
    step = torch.randint(1, len(givers), (len(samples),), generator=generator)
    donor = givers[(place + step) % len(givers)]
    return donor.to(pool.lengths.device), torch.ones(len(samples), dtype=torch.bool, device=pool.lengths.device)
