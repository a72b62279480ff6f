"""Listen to a step of a LightningModule and add terms to its loss: the only place that changes a loss."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

__all__ = ["StepTap", "tap_step"]


@dataclass(frozen=True, eq=False)
class StepTap:
    """What one callback wants of a step.

    Args:
        change: Called with the batch before the step; the step gets what it returns.
        context: Called with the batch of the step; what it returns is entered around the step.
        term: Called with the batch of the step and with what the step returned; what it returns is added to the loss.
    """

    change: Callable[[Any], Any] | None = None
    context: Callable[[Any], AbstractContextManager[Any]] | None = None
    term: Callable[[Any, Any], Tensor | None] | None = None


class _TappedStep:
    """Stands in for ``module.<name>`` for as long as somebody listens."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module = module
        self.name = name
        self.taps: list[StepTap] = []
        self._own = vars(module).get(name)  # a compiled module carries its step as an attribute
        self._original = getattr(module, name)
        functools.update_wrapper(self, self._original, updated=())  # Lightning reads the signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        taps = tuple(self.taps)
        batch, args, kwargs = _changed(taps, args, kwargs)
        with ExitStack() as stack:
            for tap in taps:
                if tap.context is not None:
                    stack.enter_context(tap.context(batch))
            output = self._original(*args, **kwargs)
        for tap in taps:
            if tap.term is not None and output is not None:  # None: the step was skipped
                output = _with_term(output, tap.term(batch, output))
        return output

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Give a copied module (weight averaging) its own plain step, with nobody listening."""
        return copy.deepcopy(self._original, memo)

    def restore(self) -> None:
        """Give the module back what it had."""
        if vars(self.module).get(self.name) is not self:
            return  # somebody wrapped this wrapper: it stays, and passes through
        delattr(self.module, self.name)
        if self._own is not None:
            setattr(self.module, self.name, self._own)


def tap_step(module: nn.Module, name: str, tap: StepTap) -> Callable[[], None]:
    """Let ``tap`` take part in every call of ``module.<name>``.

    All callbacks of a module share one wrapper. Wrappers that callbacks put on and took off one by one would be left
    behind, because Lightning tears callbacks down in the order in which it set them up.

    Args:
        module: A LightningModule.
        name: ``"training_step"`` or ``"validation_step"``.
        tap: What to do around and after the step.

    Returns:
        A function that undoes it; calling it twice is harmless.
    """
    step = vars(module).get(name)
    if not isinstance(step, _TappedStep) or step.module is not module:  # a shallow copy carries the original's
        step = _TappedStep(module, name)
        setattr(module, name, step)
    step.taps.append(tap)

    def remove() -> None:
        if tap in step.taps:
            step.taps.remove(tap)
        if not step.taps:
            step.restore()

    return remove


def _changed(
    taps: Sequence[StepTap], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Return the batch that the taps make of the one of a call, and the arguments with it."""
    batch = args[0] if args else kwargs.get("batch")
    for tap in taps:
        if tap.change is not None:
            batch = tap.change(batch)
    if args:
        return batch, (batch, *args[1:]), kwargs
    return batch, args, {**kwargs, "batch": batch} if "batch" in kwargs else kwargs


def _with_term(output: Any, term: Tensor | None) -> Any:
    if term is None:
        return output
    if isinstance(output, Mapping):
        return {**output, "loss": output["loss"] + term}
    return output + term
