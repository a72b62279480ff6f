"""Let feedback take part in every training step: other inputs before it, a term of the loss after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from attn_callbacks._lightning import MisconfigurationException, rank_zero_warn
from attn_callbacks.batch import BatchSchema
from attn_callbacks.callbacks._fed_step import FedStep, step_seed
from attn_callbacks.callbacks._forward import ForwardCall
from attn_callbacks.callbacks._guard import message
from attn_callbacks.callbacks._steps import StepTap
from attn_callbacks.capture import AttentionRecorder
from attn_callbacks.feedback import StepFeedback
from attn_callbacks.feedback.ledger import feedback_names

if TYPE_CHECKING:
    from pytorch_lightning.strategies import Strategy

__all__ = ["FedSteps"]


class FedSteps:
    """What every training step goes through while some feedback is active; all others run untouched.

    Args:
        module: The module that trains.
        feedback: Feedback that takes part, in the order in which it changes inputs and adds terms.
        schema: Where a batch has what.
        place: Returns the optimiser steps taken and the index of the batch.
        seed: Returns numbers that random ones depend on: of the run, and of this process.
    """

    def __init__(
        self,
        module: nn.Module,
        feedback: Sequence[StepFeedback],
        schema: BatchSchema,
        place: Callable[[], tuple[int, int]],
        seed: Callable[[], tuple[int, ...]],
    ) -> None:
        self.tap = StepTap(change=self._change, context=self._around, term=self._term)
        self._module, self._feedback, self._schema = module, tuple(feedback), schema
        self._place, self._seed = place, seed
        self._active: list[StepFeedback] = []
        self._step: FedStep | None = None  # the present one: it holds the graph
        self._recorders: dict[tuple[str, ...] | None, AttentionRecorder] = {}
        self._changed: set[int] = set()  # feedback that changed the inputs of the present step
        self._sums: dict[int, Tensor] = {}
        self._steps: dict[int, list[int]] = {}  # by feedback: steps with a term, with other inputs, and all

    def means(self, strategy: Strategy) -> dict[str, float]:
        """Return the mean term of each feedback since the last call, over all processes; each of them must call it.

        Terms are not logged step by step: a process whose batches have no marked tokens would not take part.

        Raises:
            MisconfigurationException: If a feedback was active and had nothing to look at in any step.
        """
        names = feedback_names(self._feedback)
        own = torch.zeros(len(names), 4, dtype=torch.float64)
        for number in range(len(names)):
            own[number] = torch.tensor([float(self._sums.get(number, 0.0)), *self._steps.get(number, (0, 0, 0))])
        self._sums, self._steps = {}, {}
        dtype = torch.float32 if strategy.root_device.type == "mps" else torch.float64
        totals = strategy.reduce(own.to(strategy.root_device, dtype), reduce_op="sum").tolist()
        found = {}
        for name, feedback, (total, with_term, changed, steps) in zip(names, self._feedback, totals, strict=True):
            if steps and not with_term + changed and (feedback.sees or _changes(feedback)):
                self._tell_idle(feedback, int(steps))
            if with_term:
                found[name] = total / with_term
        return found

    def _change(self, batch: Any) -> Any:
        self._step = None
        self._changed.clear()
        self._active = [feedback for feedback in self._feedback if feedback.active]
        if not self._active:
            return batch
        number, batch_index = self._place()
        step = FedStep(self._module, self._schema, batch, number, step_seed(*self._seed(), number, batch_index))
        with _told():
            self._change_inputs(step)
        self._step = step
        return step.batch

    def _change_inputs(self, step: FedStep) -> None:
        traced = any("inputs" in feedback.sees for feedback in self._active)
        changing = [feedback for feedback in self._active if _changes(feedback)]
        if not traced and not changing:
            return
        inputs = step.read_inputs()
        for feedback in changing:
            other = feedback.change_inputs(inputs, step)
            if other is not None:
                self._changed.add(id(feedback))
                step.put_inputs(inputs, other)
                inputs = other
        if traced and inputs.is_floating_point():
            leaf = inputs.detach().requires_grad_()
            step.put_inputs(inputs, leaf)
            inputs = leaf
        if traced:
            step.call = ForwardCall(self._module, inputs, trace=True)

    @contextmanager
    def _around(self, batch: Any) -> Iterator[None]:
        del batch
        with ExitStack() as stack:
            if self._step is not None:
                if any(feedback.second_order for feedback in self._active):
                    stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # fused kernels have no second derivative
                for recorder in self._new_recorders():
                    stack.enter_context(recorder)
                if self._step.call is not None:
                    stack.enter_context(self._step.call.watch())
            yield

    def _new_recorders(self) -> Sequence[AttentionRecorder]:
        wanted = {feedback.layers for feedback in self._active if "attention" in feedback.sees}
        self._recorders = {layers: AttentionRecorder(self._module, layers) for layers in sorted(wanted, key=repr)}
        return tuple(self._recorders.values())

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
            with _told(), _second_order(feedback):
                extra = feedback.term(step)
            self._count(number, extra, changed=id(feedback) in self._changed)
            if extra is not None:
                total = extra if total is None else total + extra
        return total

    def _tell_idle(self, feedback: StepFeedback, steps: int) -> None:
        """Refuse what was asked for and cannot be; what switched itself on is withdrawn instead."""
        marks = getattr(feedback, "region", None) or "relevance` or `spurious"
        text = (
            f"`{type(feedback).__name__}` saw no `{marks}` in {steps} training steps, so it did nothing. Say where "
            "training batches have them: BatchSchema(spurious=...)"
        )
        if getattr(feedback, "when", "always") == "always":
            raise MisconfigurationException(f"{text}.")
        feedback.withdraw()
        rank_zero_warn(f"{text}. It is withdrawn.")

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


@contextmanager
def _told() -> Iterator[None]:
    """Name what is wrong with the set-up as the Trainer's users know it."""
    try:
        yield
    except (KeyError, ValueError) as error:
        raise MisconfigurationException(message(error)) from error


def _changes(feedback: StepFeedback) -> bool:
    """It acts on inputs, whether or not it adds a term as well."""
    return type(feedback).change_inputs is not StepFeedback.change_inputs
