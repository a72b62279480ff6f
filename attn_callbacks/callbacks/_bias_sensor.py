"""What BiasMonitor measures: predictions, attention on token sets, reliance on them, and what goes with errors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attn_callbacks._lightning import rank_zero_warn
from attn_callbacks.batch import BatchSchema
from attn_callbacks.bias import BiasReport
from attn_callbacks.callbacks._bias_report import build_report
from attn_callbacks.callbacks._bias_step import BiasStep
from attn_callbacks.callbacks._bias_sums import BiasSums
from attn_callbacks.callbacks._fed import MOST_GROUPS, FedCounts
from attn_callbacks.callbacks._guard import Guard
from attn_callbacks.callbacks._reliance_probe import RelianceProbe, class_scores
from attn_callbacks.callbacks._token_names import PLACES, TokenNames, token_numbers
from attn_callbacks.callbacks._watch import QuietRecorder, forward_outputs
from attn_callbacks.capture import AttentionCall

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = ["BiasSensor"]


class BiasSensor:
    """Add up one validation after the other; knows batches and steps.

    Args:
        schema: Where a batch has what.
        classes: Names of the classes; empty: numbers.
        groups: Names of the groups; empty: numbers, at most 64.
        rows: Query rows looked at in each sequence.
        min_support: Samples below which nothing is concluded.
        probes: Batches on which reliance and association are measured.
        tokenizer: Names tokens.
    """

    def __init__(
        self,
        schema: BatchSchema,
        classes: Sequence[str],
        groups: Sequence[str],
        rows: int,
        min_support: int,
        probes: int,
        tokenizer: Any,
    ) -> None:
        self.fed = FedCounts()
        self.broken = 0  # samples of the last report that were left out: their logits are not finite
        self._schema, self._tokenizer = schema, tokenizer
        self._classes, self._groups = tuple(classes), tuple(groups)
        self._rows, self._min_support, self._probes = rows, min_support, probes
        self._generator = torch.Generator()
        self._told = False
        self._has_logits = False  # the step returns them: learned at the first batch
        self._probe_guard = Guard("The measurement of reliance by `BiasMonitor`")
        self._names = TokenNames()
        self.reset()

    def reset(self, seed: int = 0) -> None:
        """Start a validation."""
        self._generator.manual_seed(seed)
        sets = self._schema.token_sets
        names = [f"{kind}/{name}" for kind in ("mass", "reliance") for name in sets]
        self._sums = BiasSums(("confusion", "calibration", "attention", "association", *names))
        self._broken: Tensor | int = 0
        self._seen, self._samples, self._every = 0, 0, 1
        self._probe: RelianceProbe | None = None
        self._step = BiasStep()

    def expect(self, module: nn.Module, batches: float, is_sharded: bool) -> None:
        """Spread what costs more than looking over the batches to come.

        Args:
            module: The module that is validated.
            batches: How many there are; infinite where nobody knows.
            is_sharded: Processes have to run the network equally often, and what is marked differs between them.
        """
        self._every = max(1, math.ceil(batches / max(self._probes, 1))) if math.isfinite(batches) else 1
        self._names = TokenNames.of(module)
        asked = [name for name in self._schema.token_sets if name != "relevance"]
        self._probe = RelianceProbe(module, self._schema, asked) if self._probes and not is_sharded else None

    def begin(self, batch: Any) -> None:
        """Read what the next step is going to show."""
        marked = {name: self._schema.flags(name, batch) for name in self._schema.token_sets}
        sets = {name: mask for name, mask in marked.items() if mask is not None}
        number, self._seen = self._seen, self._seen + 1
        probed = number % self._every == 0 and number // self._every < self._probes
        self._step = BiasStep(self._schema.flags("valid", batch), sets, probed)

    @contextmanager
    def listen(self, recorder: QuietRecorder, batch: Any) -> Iterator[None]:
        """Listen to one validation step as far as its batch calls for it."""
        step = self._step
        with ExitStack() as stack:
            if step.sets or step.probed:
                recorder.required = bool(step.sets.keys() & {"relevance", "spurious"})  # many models have none
                stack.enter_context(recorder.watch())
            if not self._has_logits:
                stack.enter_context(forward_outputs(recorder.model, step.outputs))
            if step.probed and step.sets and self._probe is not None:
                stack.enter_context(self._probe.watch(batch))
            yield

    def measure(self, call: AttentionCall) -> None:
        """Measure the attention of a call."""
        self._step.measure(call, self._rows, self._generator)

    def add(self, output: Any, batch: Any) -> None:
        """Count the batch whose step was listened to.

        Raises:
            ValueError: If there are no logits or no labels, or they do not fit the names given.
        """
        step, self._step = self._step, BiasStep()
        self._has_logits = self._has_logits or self._schema.step_logits(output) is not None
        logits, target = self._schema.step_logits(output, step.outputs), self._schema.read("target", batch)
        if logits is None or target is None:
            raise ValueError(_missing("logits" if logits is None else "target"))
        scores = class_scores(logits)
        target = self._left_out(scores, _numbers("target", target, scores.device))
        group = self._schema.read("group", batch)
        group = None if group is None else _numbers("group", group, scores.device)
        self._make_room(scores.shape[1], group)
        predicted, device = scores.argmax(dim=-1), scores.device
        self._sums.metric("confusion", device).update(predicted, target, group)
        self._sums.metric("calibration", device).update(scores, target, group)
        right = predicted == target
        if not self._told and (text := step.unfitting()):
            self._told = True
            rank_zero_warn(f"`BiasMonitor`: {text}")
        for name, masses in step.masses.items():
            mass = torch.stack(masses).nanmean(dim=0)
            self._sums.metric(f"mass/{name}", device).update(mass, step.shares[name], target, right)
        if step.probed:
            self._associate(step, batch, right, target)
            if step.sets and self._probe is not None:
                with self._probe_guard.block():
                    self._probe.keep(batch, predicted)
        self._samples += len(target)

    def report(self, trainer: Trainer, *, failed: bool) -> BiasReport | None:
        """Reduce over processes and conclude; every process must call it.

        Args:
            trainer: The Trainer.
            failed: This process could not count all of its batches.

        Returns:
            The same report everywhere; ``None`` if a process failed or none saw a batch.
        """
        if not failed:
            self._measure_reliance(trainer)
        gathered = self._sums.gathered(trainer, failed=failed, broken=int(self._broken))
        self.fed.gather(trainer.strategy)
        if gathered is None:
            return None
        sizes, metrics, self.broken = gathered
        if "association" in metrics:
            self._names.share(trainer.strategy)
        return build_report(
            trainer.current_epoch,
            trainer.global_step,
            metrics,
            class_names=self._classes or tuple(map(str, range(sizes.classes))),
            group_names=None if sizes.groups == 1 else self._groups,
            fed=self.fed,
            min_support=self._min_support,
            token_name=self._names.namer(self._tokenizer, sizes.tokens),
            examples=self._names.examples(self._tokenizer),
            are_places=sizes.tokens == PLACES,
        )

    def _make_room(self, classes: int, group: Any) -> None:
        if self._classes and classes > len(self._classes):
            raise ValueError(f"`classes` must name all {classes} classes of the logits, got {self._classes}.")
        groups = 1 if group is None else len(self._groups) or MOST_GROUPS
        if not self._sums.sizes.classes:
            self._sums.sizes = self._sums.sizes._replace(classes=max(classes, len(self._classes)), groups=groups)

    def _associate(self, step: BiasStep, batch: Any, right: Tensor, target: Tensor) -> None:
        """Note which tokens, or which places, attention falls on in right and in wrong samples."""
        fitting = [pair for pair in step.received if len(pair[0]) == len(target)]
        same = [pair for pair in fitting if pair[0].shape == fitting[0][0].shape]
        if not same:
            return
        received, valid = torch.stack([mean for mean, _ in same]).mean(dim=0), same[0][1]
        tokens = token_numbers(self._schema, batch, received, self._names.room(places=False))
        if tokens is None:
            self._names.see(self._schema.read("image", batch), received.shape[1])
        else:
            self._names.note(tokens, valid, ~right & (target >= 0), self._samples)
        self._sums.sizes = self._sums.sizes._replace(tokens=self._names.room(places=tokens is None))
        ids = torch.arange(received.shape[1], device=received.device).expand_as(received) if tokens is None else tokens
        self._sums.metric("attention", received.device).update(received, valid, target)
        self._sums.metric("association", received.device).update(received, ids, valid, right, target)

    def _measure_reliance(self, trainer: Trainer) -> None:
        if self._probe is None:
            return
        with self._probe_guard.block():
            for found in self._probe.run(self._generator, trainer.precision_plugin.val_step_context):
                before, after = class_scores(found.before).argmax(dim=-1), class_scores(found.after).argmax(dim=-1)
                metric = self._sums.metric(f"reliance/{found.name}", before.device)
                metric.update(before, after, found.target, found.present)

    def _left_out(self, logits: Tensor, target: Tensor) -> Tensor:
        """Ignore samples for which a diverged model predicts nothing; the largest of several NaN is class 0."""
        finite = logits.isfinite().all(dim=1)
        self._broken = self._broken + (~finite).sum()
        return target.where(finite, -1) if target.shape == finite.shape else target


def _numbers(name: str, values: Any, device: torch.device) -> Tensor:
    try:
        return torch.as_tensor(values, device=device)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`{name}` must hold one number a sample, got {repr(values)[:80]}. Number them, as in `names.index(name)`."
        ) from error


def _missing(part: str) -> str:
    if part == "logits":
        return (
            "No `logits` were found in the output of `validation_step`, nor did `forward` return any. Return "
            "{'loss': ..., 'logits': ...} from `validation_step`, or say where they are: BatchSchema(logits=...)."
        )
    return "No `target` was found in the validation batch. Say where it is: BatchSchema(target=...)."
