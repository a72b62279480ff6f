"""What BiasMonitor counts: predictions by group and class, attention on token sets, and what training was fed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attn_callbacks.batch import BatchSchema
from attn_callbacks.bias import AttentionShare, BiasReport
from attn_callbacks.callbacks._fed import MOST_GROUPS, FedCounts
from attn_callbacks.callbacks._layers import drawn_rows, known_tokens, samples_of
from attn_callbacks.callbacks._watch import QuietRecorder, forward_outputs
from attn_callbacks.capture import AttentionCall
from attn_callbacks.functional import attention_mass, target_share
from attn_callbacks.metrics import ClassMass, GroupConfusion

if TYPE_CHECKING:
    from pytorch_lightning.strategies import Strategy

__all__ = ["BiasSensor", "MissingPartError"]

_TOKEN_SETS = ("relevance", "spurious")

class MissingPartError(ValueError):
    """A validation batch or step lacks what bias is measured from."""


class BiasSensor:
    """Add up one validation after the other; knows batches and steps, not the Trainer.

    Args:
        schema: Where a batch has what.
        classes: Names of the classes; empty: numbers.
        groups: Names of the groups; empty: numbers, at most 64.
        layers: Attention modules whose mass is measured; ``None``: all.
        rows: Query rows looked at in each sequence.
        min_support: Samples below which nothing is concluded.
    """

    def __init__(
        self,
        schema: BatchSchema,
        classes: Sequence[str],
        groups: Sequence[str],
        layers: Sequence[str] | None,
        rows: int,
        min_support: int,
    ) -> None:
        self.schema = schema
        self.fed = FedCounts()
        self._classes, self._groups = tuple(classes), tuple(groups)
        self._rows, self._min_support = rows, min_support
        self._recorder = QuietRecorder("BiasMonitor (attention mass)", self._measure, layers)
        self._generator = torch.Generator()
        self.reset()

    def reset(self, seed: int = 0) -> None:
        """Start a validation."""
        self._generator.manual_seed(seed)
        self._confusion: GroupConfusion | None = None
        self._masses: dict[str, ClassMass] = {}
        self._forget_batch()

    @contextmanager
    def watch(self, module: nn.Module, batch: Any) -> Iterator[None]:
        """Watch one validation step."""
        self._forget_batch()
        self._valid = self.schema.flags("valid", batch)
        self._sets = {name: mask for name in _TOKEN_SETS if (mask := self.schema.flags(name, batch)) is not None}
        self._samples = self.schema.size(batch)
        with ExitStack() as stack:
            if self._sets:
                stack.enter_context(self._recorder.watch(module))
            if not self._logits_in_output:
                self._forwarded = stack.enter_context(forward_outputs(module))
            yield

    def add(self, output: Any, batch: Any) -> None:
        """Count the batch whose step was watched.

        Raises:
            MissingPartError: If there are no logits or no labels.
        """
        logits = self.schema.step_logits(output, self._forwarded)
        self._logits_in_output = self._logits_in_output or self.schema.step_logits(output) is not None
        target = self.schema.read("target", batch)
        if logits is None or target is None:
            raise MissingPartError(_missing("logits" if logits is None else "target"))
        predicted, classes = _predicted(logits)
        group = self.schema.read("group", batch)
        if self._confusion is None:
            count = 1 if group is None else len(self._groups) or MOST_GROUPS
            self._confusion = GroupConfusion(max(classes, len(self._classes), 2), count).to(logits.device)
        self._confusion.update(predicted, target, group)
        for name, layers in self._seen.items():
            if layers:
                self._add_mass(name, torch.stack(layers).nanmean(dim=0), target)
        self._forget_batch()

    def report(self, epoch: int, step: int, strategy: Strategy) -> BiasReport | None:
        """Reduce over processes and conclude; ``None`` if no process saw a batch. Every process must call it."""
        own, device = self._confusion, strategy.root_device
        sizes = [own.num_classes, own.num_groups] if own else [0, 0]
        marked = [int(name in self._masses) for name in _TOKEN_SETS]
        agreed = strategy.reduce(torch.tensor([*sizes, *marked], device=device), reduce_op="max")
        classes, groups, *seen = agreed.tolist()
        if not classes:
            return None
        counts = (own or GroupConfusion(classes, groups).to(device)).compute().cpu()
        shown = len(self._groups) or _last_used(counts)
        self.fed.gather(strategy)
        sets = [name for name, found in zip(_TOKEN_SETS, seen, strict=True) if found]
        attention = {name: self._share(name, classes, device) for name in sets}
        return BiasReport(
            epoch=epoch,
            step=step,
            counts=counts[:shown],
            class_names=self._classes or tuple(map(str, range(classes))),
            group_names=self._group_names(groups, shown),
            train_counts=self.fed.counts(shown, classes),
            attention=attention,
            min_support=self._min_support,
        )

    def _forget_batch(self) -> None:
        self._valid: Tensor | None = None
        self._samples: int | None = None
        self._sets: dict[str, Tensor] = {}
        self._seen: dict[str, list[Tensor]] = {name: [] for name in _TOKEN_SETS}
        self._shares: dict[str, Tensor] = {}
        self._forwarded: list[Any] = []

    _logits_in_output = False  # learned at the first batch: then nothing needs to watch the forward

    def _measure(self, call: AttentionCall) -> None:
        call = known_tokens(call, self._valid)
        rows, real = drawn_rows(call, self._rows, self._generator)
        for name, mask in self._sets.items():
            if call.is_cross or mask.shape != (call.shape[0], call.shape[3]):
                continue  # other tokens than the ones marked
            mass = attention_mass(call.weights(rows), mask, call.key_valid, row_valid=real)
            self._seen[name].append(mass.nanmean(dim=1))
            self._shares[name] = target_share(mask, call.key_valid)

    def _add_mass(self, name: str, mass: Tensor, target: Tensor) -> None:
        if self._confusion is None:
            return
        if name not in self._masses:
            self._masses[name] = ClassMass(self._confusion.num_classes).to(mass.device)
        self._masses[name].update(mass, self._shares[name], target)

    def _share(self, name: str, classes: int, device: torch.device) -> AttentionShare:
        metric = self._masses.get(name) or ClassMass(classes).to(device)
        return AttentionShare(*(tensor.cpu() for tensor in metric.compute()))

    def _group_names(self, groups: int, shown: int) -> tuple[str, ...]:
        if groups == 1:
            return ("all",)
        return self._groups or tuple(f"group {number}" for number in range(shown))


def _predicted(logits: Tensor) -> tuple[Tensor, int]:
    """Predicted classes and their number; one logit a sample is a binary classifier."""
    if logits.ndim == 1 or logits.shape[-1] == 1:
        return (logits.reshape(-1) > 0).long(), 2
    if logits.ndim != 2:
        raise MissingPartError(f"`logits` must have shape (samples, classes), got {tuple(logits.shape)}.")
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
