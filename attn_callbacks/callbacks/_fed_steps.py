"""Let feedback take part in every training step: other inputs before it, a term of the loss after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from attn_callbacks.batch import BatchSchema
from attn_callbacks.callbacks._fed_failures import FedFailures
from attn_callbacks.callbacks._fed_step import FedStep, step_seed
from attn_callbacks.callbacks._forward import ForwardCall
from attn_callbacks.callbacks._steps import StepTap
from attn_callbacks.capture import AttentionRecorder
from attn_callbacks.feedback import StepFeedback
from attn_callbacks.feedback.ledger import feedback_names

if TYPE_CHECKING:
    from pytorch_lightning.strategies import Strategy

__all__ = ["FedSteps"]

_ENOUGH = 20
"""Steps of part of an epoch after which having done nothing is no chance."""


class FedSteps:
    """What every training step goes through while some feedback is active; all others run untouched.

    Args:
        module: The module that trains.
        feedback: Feedback that takes part, in the order in which it changes inputs and adds terms.
        schema: Where a batch has what.
        place: Returns the optimiser steps taken and the index of the batch.
        seed: Returns numbers that random ones depend on: of the run, and of this process.
        failures: What becomes of feedback that cannot do its part.
    """

    def __init__(
        self,
        module: nn.Module,
        feedback: Sequence[StepFeedback],
        schema: BatchSchema,
        place: Callable[[], tuple[int, int]],
        seed: Callable[[], tuple[int, ...]],
        failures: FedFailures,
    ) -> None:
        self.tap = StepTap(change=self._change, context=self._around, term=self._term)
        self._module, self._feedback, self._schema = module, tuple(feedback), schema
        self._place, self._seed, self._failures = place, seed, failures
        self._active: list[StepFeedback] = []
        self._step: FedStep | None = None  # the present one: it holds the graph
        self._recorders: dict[tuple[str, ...] | None, AttentionRecorder] = {}
        self._changed: set[int] = set()  # feedback that changed the inputs of the present step
        self._sums: dict[int, Tensor] = {}
        self._steps: dict[int, list[int]] = {}  # by feedback: steps with a term, with other inputs, and all
        self._begun: dict[int, int] = {}  # by feedback: steps it was active in, finished or not
        self._all_begun = 0
        self._from_start = False  # the first of them began an epoch

    def means(self, strategy: Strategy, is_whole: bool = True) -> dict[str, float]:
        """Return the mean term of each feedback since the last call, over all processes; each of them must call it.

        Terms are not logged step by step: a process whose batches have no marked tokens would not take part.

        Args:
            strategy: Adds up over processes.
            is_whole: The epoch went through all its batches.

        Raises:
            MisconfigurationException: If a feedback was active in all of an epoch and had nothing to look at.
        """
        names = feedback_names(self._feedback)
        own = torch.zeros(len(names), 5, dtype=torch.float64)
        for number in range(len(names)):
            missed = self._all_begun - self._begun.get(number, 0)
            counts = self._steps.get(number, (0, 0, 0))
            own[number] = torch.tensor([float(self._sums.get(number, 0.0)), *counts, missed])
        is_whole = is_whole and self._from_start
        self._sums, self._steps, self._begun, self._all_begun = {}, {}, {}, 0
        dtype = torch.float32 if strategy.root_device.type == "mps" else torch.float64
        totals = strategy.reduce(own.to(strategy.root_device, dtype), reduce_op="sum").tolist()
        found = {}
        for name, feedback, (total, with_term, changed, steps, missed) in zip(
            names, self._feedback, totals, strict=True
        ):
            is_idle = not with_term + changed and (feedback.sees or _changes(feedback))
            if is_idle and steps and not missed and (is_whole or steps >= _ENOUGH):
                self._failures.tell_idle(feedback, int(steps))
            if with_term:
                found[name] = total / with_term
        return found

    def _change(self, batch: Any) -> Any:
        self._step = None
        self._changed.clear()
        self._active = [feedback for feedback in self._feedback if feedback.active]
        number, batch_index = self._place()
        self._begin(batch_index)
        if not self._active:
            return batch
        step = FedStep(self._module, self._schema, batch, number, step_seed(*self._seed(), number, batch_index))
        self._change_inputs(step)
        self._step = step
        return step.batch

    def _begin(self, batch_index: int) -> None:
        if self._all_begun == 0:
            self._from_start = batch_index == 0
        self._all_begun += 1
        for number, feedback in enumerate(self._feedback):
            self._begun[number] = self._begun.get(number, 0) + (feedback in self._active)

    def _change_inputs(self, step: FedStep) -> None:
        changing = [each for each in self._active if _changes(each) and self._finds(each, step)]
        concerned = [each for each in self._active if each in changing or "inputs" in each.sees]
        if not concerned:
            return
        with self._trying(*concerned):
            inputs = step.read_inputs()
            for feedback in changing:
                inputs = self._change_by(feedback, inputs, step)
        traced = [feedback for feedback in self._active if "inputs" in feedback.sees]
        if not traced:
            return
        with self._trying(*traced):
            if inputs.is_floating_point():
                leaf = inputs.detach().requires_grad_()
                step.put_inputs(inputs, leaf)
                inputs = leaf
            step.call = ForwardCall(self._module, inputs, trace=True)

    def _finds(self, feedback: StepFeedback, step: FedStep) -> bool:
        with self._trying(feedback):
            return feedback.region is None or step.marks(feedback.region)
        return False

    def _change_by(self, feedback: StepFeedback, inputs: Tensor, step: FedStep) -> Tensor:
        with self._trying(feedback):
            other = feedback.change_inputs(inputs, step)
            if other is not None:
                step.put_inputs(inputs, other)
                self._changed.add(id(feedback))
                return other
        return inputs

    @contextmanager
    def _trying(self, *feedback: StepFeedback) -> Iterator[None]:
        """What raises inside is no longer active, or ends training."""
        with self._failures.of(feedback):
            yield
        self._active = [each for each in self._active if each.acting]

    @contextmanager
    def _around(self, batch: Any) -> Iterator[None]:
        del batch
        with ExitStack() as stack:
            if self._step is not None:
                if any(feedback.second_order for feedback in self._active):
                    stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # fused kernels have no second derivative
                for layers in sorted({each.layers for each in self._active if "attention" in each.sees}, key=repr):
                    stack.enter_context(self._recording(layers))
                if self._step.call is not None:
                    stack.enter_context(self._step.call.watch())
            yield

    @contextmanager
    def _recording(self, layers: tuple[str, ...] | None) -> Iterator[None]:
        """Record attention; finding none is the failure of who wanted it, and not of the step, which is done."""
        recorder = self._recorders[layers] = AttentionRecorder(self._module, layers)
        recorder.__enter__()
        try:
            yield
        except BaseException as error:
            recorder.__exit__(type(error), error, error.__traceback__)
            raise
        wanting = [each for each in self._active if "attention" in each.sees and each.layers == layers]
        with self._trying(*wanting):
            recorder.__exit__(None, None, None)

    def _term(self, batch: Any, output: Any) -> Tensor | None:
        del batch
        step, self._step = self._step, None
        recorders, self._recorders = self._recorders, {}
        if step is None:
            return None
        step.output = output
        total: Tensor | None = None
        for number, feedback in enumerate(self._feedback):
            if feedback not in self._active:
                continue
            step.recorder = recorders.get(feedback.layers) if "attention" in feedback.sees else None
            with self._trying(feedback), _second_order(feedback):
                extra = feedback.term(step)
                self._count(number, extra, changed=id(feedback) in self._changed)
                if extra is not None:
                    total = extra if total is None else total + extra
        return total

    def _count(self, number: int, extra: Tensor | None, changed: bool) -> None:
        counts = self._steps.setdefault(number, [0, 0, 0])
        for place, counted in enumerate((extra is not None, changed, True)):
            counts[place] += counted
        if extra is not None:
            self._sums[number] = self._sums.get(number, 0.0) + extra.detach().float()


@contextmanager
def _second_order(feedback: StepFeedback) -> Iterator[None]:
    if not feedback.second_order:
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield


def _changes(feedback: StepFeedback) -> bool:
    """It acts on inputs, whether or not it adds a term as well."""
    return type(feedback).change_inputs is not StepFeedback.change_inputs
