"""What BiasMonitor counts: predictions by group and class, attention on token sets, and what training was fed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attn_callbacks.batch import BatchSchema
from attn_callbacks.bias import AttentionShare, BiasReport
from attn_callbacks.callbacks._fed import MOST_GROUPS, FedCounts
from attn_callbacks.callbacks._layers import drawn_rows, known_tokens
from attn_callbacks.callbacks._watch import QuietRecorder, forward_outputs
from attn_callbacks.capture import AttentionCall
from attn_callbacks.functional import attention_mass, target_share
from attn_callbacks.metrics import ClassMass, GroupConfusion

if TYPE_CHECKING:
    from pytorch_lightning.strategies import Strategy

__all__ = ["BiasSensor"]

_TOKEN_SETS = ("relevance", "spurious")


@dataclass
class _Step:
    """What is known of one validation step."""

    valid: Tensor | None
    sets: dict[str, Tensor]
    masses: defaultdict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    shares: dict[str, Tensor] = field(default_factory=dict)
    outputs: list[Any] = field(default_factory=list)


class BiasSensor:
    """Add up one validation after the other; knows batches and steps, not the Trainer.

    Args:
        schema: Where a batch has what.
        classes: Names of the classes; empty: numbers.
        groups: Names of the groups; empty: numbers, at most 64.
        rows: Query rows looked at in each sequence.
        min_support: Samples below which nothing is concluded.
    """

    def __init__(
        self, schema: BatchSchema, classes: Sequence[str], groups: Sequence[str], rows: int, min_support: int
    ) -> None:
        self.fed = FedCounts()
        self._schema = schema
        self._classes, self._groups = tuple(classes), tuple(groups)
        self._rows, self._min_support = rows, min_support
        self._generator = torch.Generator()
        self._has_logits = False  # the step returns them: learned at the first batch
        self.broken = 0  # samples of the last report that were left out: their logits are not finite
        self.reset()

    def reset(self, seed: int = 0) -> None:
        """Start a validation."""
        self._generator.manual_seed(seed)
        self._confusion: GroupConfusion | None = None
        self._broken: Tensor | int = 0
        self._masses: dict[str, ClassMass] = {}
        self._step = _Step(None, {})

    def begin(self, batch: Any) -> None:
        """Read what the next step is going to show."""
        sets = {name: mask for name in _TOKEN_SETS if (mask := self._schema.flags(name, batch)) is not None}
        self._step = _Step(self._schema.flags("valid", batch), sets)

    @contextmanager
    def listen(self, recorder: QuietRecorder) -> Iterator[None]:
        """Listen to one validation step as far as its batch calls for it."""
        watch = recorder.watch() if self._step.sets else nullcontext()
        forward = nullcontext() if self._has_logits else forward_outputs(recorder.model, self._step.outputs)
        with watch, forward:
            yield

    def measure(self, call: AttentionCall) -> None:
        """Measure the attention of a call on the marked tokens."""
        call = known_tokens(call, self._step.valid)
        rows, real = drawn_rows(call, self._rows, self._generator)
        for name, mask in self._step.sets.items():
            if call.is_cross or mask.shape != (call.shape[0], call.shape[3]):
                continue  # other tokens than the ones marked
            mass = attention_mass(call.weights(rows), mask, call.key_valid, row_valid=real)
            self._step.masses[name].append(mass.nanmean(dim=1))
            self._step.shares[name] = target_share(mask, call.key_valid)

    def add(self, output: Any, batch: Any) -> None:
        """Count the batch whose step was listened to.

        Raises:
            ValueError: If there are no logits or no labels, or they do not fit the names given.
        """
        step, self._step = self._step, _Step(None, {})
        self._has_logits = self._has_logits or self._schema.step_logits(output) is not None
        logits, target = self._schema.step_logits(output, step.outputs), self._schema.read("target", batch)
        if logits is None or target is None:
            raise ValueError(_missing("logits" if logits is None else "target"))
        predicted, classes = _predicted(logits)
        target = self._left_out(logits, torch.as_tensor(target, device=logits.device))
        if self._classes and classes > len(self._classes):
            raise ValueError(f"`classes` must name all {classes} classes of the logits, got {self._classes}.")
        group = self._schema.read("group", batch)
        if self._confusion is None:
            groups = 1 if group is None else len(self._groups) or MOST_GROUPS
            self._confusion = GroupConfusion(max(classes, len(self._classes)), groups).to(logits.device)
        self._confusion.update(predicted, target, group)
        for name, masses in step.masses.items():
            if name not in self._masses:
                self._masses[name] = ClassMass(self._confusion.num_classes).to(logits.device)
            self._masses[name].update(torch.stack(masses).nanmean(dim=0), step.shares[name], target)

    def _left_out(self, logits: Tensor, target: Tensor) -> Tensor:
        """Ignore samples for which a diverged model predicts nothing; the largest of several NaN is class 0."""
        finite = logits.reshape(len(logits), -1).isfinite().all(dim=1)
        self._broken = self._broken + (~finite).sum()
        return target.where(finite, -1) if target.shape == finite.shape else target

    def report(self, epoch: int, step: int, strategy: Strategy, *, failed: bool) -> BiasReport | None:
        """Reduce over processes and conclude; every process must call it.

        Args:
            epoch: Epoch of training.
            step: Optimiser steps taken.
            strategy: Reduces over processes.
            failed: This process could not count all of its batches.

        Returns:
            The same report everywhere; ``None`` if a process failed or none saw a batch.
        """
        own, device = self._confusion, strategy.root_device
        sizes = [own.num_classes, own.num_groups] if own else [0, 0]
        marked = [int(name in self._masses) for name in _TOKEN_SETS]
        agreed = strategy.reduce(torch.tensor([int(failed), *sizes, *marked], device=device), reduce_op="max")
        any_failed, classes, groups, *seen = agreed.tolist()
        self.broken = int(strategy.reduce(torch.as_tensor(self._broken, device=device), reduce_op="sum"))
        if any_failed or not classes:
            return None
        counts = (own or GroupConfusion(classes, groups).to(device)).compute().cpu()
        sets = [name for name, found in zip(_TOKEN_SETS, seen, strict=True) if found]
        attention = {name: self._share(name, classes, device) for name in sets}
        shown = len(self._groups) or _last_used(counts)
        self.fed.gather(strategy)
        return BiasReport(
            epoch=epoch,
            step=step,
            counts=counts[:shown],
            class_names=self._classes or tuple(map(str, range(classes))),
            group_names=("all",) if groups == 1 else self._groups or tuple(f"group {n}" for n in range(shown)),
            train_counts=self.fed.counts(shown, classes),
            attention=attention,
            min_support=self._min_support,
        )

    def _share(self, name: str, classes: int, device: torch.device) -> AttentionShare:
        metric = self._masses.get(name) or ClassMass(classes).to(device)
        return AttentionShare(*(tensor.cpu() for tensor in metric.compute()))


def _predicted(logits: Tensor) -> tuple[Tensor, int]:
    """Predicted classes and their number; one logit a sample is a binary classifier."""
    if logits.ndim == 1 or logits.shape[-1] == 1:
        return (logits.reshape(-1) > 0).long(), 2
    if logits.ndim != 2:
        raise ValueError(f"`logits` must have shape (samples, classes), got {tuple(logits.shape)}.")
    return logits.argmax(dim=-1), logits.shape[-1]


def _last_used(counts: Tensor) -> int:
    used = counts.sum(dim=(1, 2)).nonzero()
    return int(used.max()) + 1 if len(used) else 1


def _missing(part: str) -> str:
    if part == "logits":
        return (
            "No `logits` were found in the output of `validation_step`, nor did `forward` return any. Return "
            "{'loss': ..., 'logits': ...} from `validation_step`, or say where they are: BatchSchema(logits=...)."
        )
    return "No `target` was found in the validation batch. Say where it is: BatchSchema(target=...)."
