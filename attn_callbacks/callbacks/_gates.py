"""Importance of heads for free: gate gradients, met in the backward of training steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from attn_callbacks._checks import at_least
from attn_callbacks._lightning import rank_zero_warn
from attn_callbacks.batch import BatchSchema
from attn_callbacks.callbacks._gate_hook import meet_gradient
from attn_callbacks.callbacks._gate_sums import GateSums
from attn_callbacks.callbacks._guard import Guard
from attn_callbacks.callbacks._layers import maps_per_sample
from attn_callbacks.callbacks._steps import StepTap
from attn_callbacks.callbacks._watch import QuietRecorder
from attn_callbacks.capture import AttentionCall
from attn_callbacks.metrics.importance import HeadImportanceResult

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["GateGradients"]

_NONE = (
    "No gradient of the loss reached the output of attention in {}: its importance is NaN. Layers without anything "
    "learned in or below them have none, nor has reentrant activation checkpointing (pass `use_reentrant=False`) or "
    "output that is changed in place."
)
_NOT_FINITE = (
    "The gradients that reached the output of attention in {} were not finite: its importance is NaN. A gradient "
    "scaler skips such steps and lowers its scale; without one, look for what overflows or divides by zero."
)


class GateGradients:
    """Listen to the backward of every n-th training step and average the size of each head's gate gradient.

    The loss is taken as a mean over the samples of the batch: the gradient of one sample is then ``1 / samples`` of its
    own, which is made good, as are the factors of gradient accumulation and of a gradient scaler. With automatic
    optimization what counts is the backward after the step (one inside it is part of the loss, such as a penalty on
    gradients); with manual optimization the sum of all. Windows and crops of a sample are summed before the size is
    taken.

    A step that is listened to runs compiled modules eagerly, and holds the output of each attention until its gradient
    has come. Fused kernels save that anyway; attention in plain operations and activation checkpointing do not, and
    then it is one hidden state a layer (the weights, for ``nn.MultiheadAttention`` with ``need_weights=True`` inside a
    checkpoint). Nothing waits for the device, no gradient is changed, and the other steps cost one comparison.

    Args:
        trainer: Knows what the loss is multiplied with before its backward.
        module: The module whose steps are listened to.
        layers: Names or glob patterns of attention modules; ``None`` takes all.
        every_n_steps: Listen to every n-th training step (batch), beginning with the first.
        schema: Where a batch has its samples.
        guard: Keeps in whatever goes wrong.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        layers: Sequence[str] | None,
        every_n_steps: int,
        schema: BatchSchema,
        guard: Guard,
    ) -> None:
        self.tap = StepTap(context=self._around)
        self._every_n_steps = at_least("every_n_steps", every_n_steps, 1)
        self._trainer, self._module, self._schema, self._guard = trainer, module, schema, guard
        self._recorder = QuietRecorder(module, layers, self._receive, guard)
        self._sums = GateSums(trainer.world_size)
        self._steps = 0
        self._looked = False
        self._told: set[str] = set()
        self._step: _Step | None = None
        self.layer_names: tuple[str, ...] = ()

    def result(self) -> HeadImportanceResult | None:
        """Return importance since the last call, over all processes; each of them must call it.

        Its rows are :attr:`layer_names`, the same on every process. ``None`` if no step was listened to since then,
        or if a process failed. NaN for layers that no gradient reached, told once.
        """
        with self._guard.block():
            self._conclude()
        looked, self._looked = self._looked, False
        with self._guard.block():
            found = self._sums.conclude(self._trainer.strategy.root_device, looked=looked, failed=self._guard.off)
            if found is not None:
                self.layer_names, result = found
                self._tell_missing(result)
                return result
        return None

    def _around(self, batch: Any) -> AbstractContextManager[Any]:
        if self._guard.off or (self._step is not None and self._step.running):  # a step inside a step is part of it
            return nullcontext()
        due = self._steps % self._every_n_steps == 0
        self._steps += 1
        if due:
            with self._guard.block():
                self._conclude()
                self._step = _Step(self._trainer, self._module, self._schema.size(batch))
                return self._listening(self._step)
        return nullcontext()

    @contextmanager
    def _listening(self, step: _Step) -> Iterator[None]:
        self._looked = True
        try:
            with self._recorder.watch():
                yield
        finally:
            step.running = False

    def _receive(self, call: AttentionCall) -> None:
        step = self._step
        if step is None:
            return
        name = step.next_name(call.name)
        met = meet_gradient(call, partial(step.add, name), step.listens, self._guard)
        step.count(call.name, met)
        self._sums.see(name if met else call.name, call.shape[1], call.device)

    def _conclude(self) -> None:
        """Take in what has arrived: signs may only be dropped once nothing more is added."""
        step, self._step = self._step, None
        for name, gates in step.close() if step is not None else ():
            self._sums.add(name, gates)

    def _tell_missing(self, result: HeadImportanceResult) -> None:
        rows = zip(self.layer_names, result.samples, result.left_out, strict=True)
        missing = [(name, bool(left_out.any())) for name, samples, left_out in rows if not samples.any()]
        self._tell("not finite", [name for name, was_dropped in missing if was_dropped], _NOT_FINITE)
        self._tell("none", [name for name, was_dropped in missing if not was_dropped], _NONE)

    def _tell(self, reason: str, layers: list[str], text: str) -> None:
        if layers and reason not in self._told:
            self._told.add(reason)
            rank_zero_warn(text.format(", ".join(map(repr, layers))))


class _Step:
    """What arrives at the calls of one training step, in units of the loss of one sample."""

    def __init__(self, trainer: Trainer, module: LightningModule, samples: int | None) -> None:
        self.running = True
        self._samples = samples
        self._manual = not module.automatic_optimization
        self._parts = trainer.accumulate_grad_batches  # the loss is divided by their number
        self._scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._counts: Counter[str] = Counter()
        self._gates: dict[str, Tensor] | None = {}

    def next_name(self, module: str) -> str:
        """Name the next call of a module, counted among those that have a gradient."""
        index = self._counts[module]
        return f"{module}#{index}" if index else module

    def count(self, module: str, met: bool) -> None:
        """Count a call of a module if it has a gradient."""
        self._counts[module] += met

    def listens(self) -> bool:
        """What arrives now is the loss."""
        return self._gates is not None and (self._manual or not self.running)

    def add(self, name: str, gates: Tensor) -> None:
        """Add what arrived at a call, ``(batch, heads)``."""
        if self._gates is not None:
            own = self._by_sample(gates)
            self._gates[name] = self._gates[name] + own if name in self._gates else own

    def close(self) -> list[tuple[str, Tensor]]:
        """Return ``(samples, heads)`` of each call whose gradient came, and let in nothing more."""
        gates, self._gates = self._gates, None
        return list((gates or {}).items())

    def _by_sample(self, gates: Tensor) -> Tensor:
        if maps_per_sample(len(gates), self._samples) > 1:
            gates = gates.unflatten(0, (self._samples, -1)).sum(dim=1)
        gates = gates * (self._parts * (self._samples or len(gates)))
        scale = getattr(self._scaler, "_scale", None)  # `get_scale` would wait for the device
        return gates if scale is None else gates / scale.to(gates.device)
