"""The forward call of a step: what went in, what came out, and the same call again with other inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from attn_callbacks.callbacks._substitute import holds, substitute
from attn_callbacks.capture.compiled import run_eagerly

__all__ = ["ForwardCall"]

Spy = Callable[..., Any]


class ForwardCall:
    """Watches a step for the call that turns inputs into logits, and can make it again.

    Watched are the module and its direct children: the outermost of these that runs with the inputs among its arguments
    is the call. Integer inputs are token ids; their continuous form is what the embedding makes of them.

    Args:
        module: A LightningModule.
        inputs: The inputs of the batch.
        trace: Give the continuous inputs a gradient, and be able to start from others.
    """

    def __init__(self, module: nn.Module, inputs: Tensor, *, trace: bool) -> None:
        self.outputs: list[Any] = []  # of the outermost calls, in their order
        self.continuous: Tensor | None = inputs if inputs.is_floating_point() else None
        self._module, self._inputs, self._trace = module, inputs, trace
        self._call: tuple[nn.Module, tuple[Any, ...], dict[str, Any]] | None = None
        self._inside = self._replaying = False
        self._given: Tensor | None = None

    @property
    def seen(self) -> bool:
        """There was a call with the very inputs, so that it can be made again."""
        return self._call is not None

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Watch one step."""
        with self._spies():
            yield

    def again(self, inputs: Tensor) -> Any:
        """Make the call once more with other inputs of the batch, and return what it returns.

        Raises:
            ValueError: If there was none.
        """
        if self._call is None:
            raise ValueError(
                "No call of the module, or of a network directly below it, got the `inputs` of the batch as they are. "
                "Hand them over unchanged, as in `self(inputs)`, or say what they are: BatchSchema(inputs=...)."
            )
        part, args, kwargs = self._call
        args, kwargs = substitute((args, kwargs), self._inputs, inputs)
        with run_eagerly(self._module):
            return part(*args, **kwargs)

    def from_continuous(self, continuous: Tensor) -> Any:
        """Make the call once more from other continuous inputs.

        Raises:
            ValueError: If there was none, or no embedding looked up the token ids.
        """
        if self._inputs.is_floating_point():
            return self.again(continuous)
        if self.continuous is None:
            raise ValueError(
                "No `nn.Embedding` looked up the token ids of the batch, so there is nothing continuous to change. "
                "Say where the ids are: BatchSchema(inputs=...)."
            )
        self._given = continuous
        try:
            with self._spies():
                return self.again(self._inputs)
        finally:
            self._given = None

    @contextmanager
    def _spies(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(run_eagerly(self._module))
            if self._given is None:
                for part in (self._module, *self._module.children()):
                    stack.enter_context(_spied(part, self._outermost(part)))
            if self._trace and not self._inputs.is_floating_point():
                for part in self._module.modules():
                    if isinstance(part, nn.Embedding):
                        stack.enter_context(_spied(part, self._embedding))
            yield

    def _outermost(self, part: nn.Module) -> Callable[[Spy], Spy]:
        def wrap(forward: Spy) -> Spy:
            def spy(*args: Any, **kwargs: Any) -> Any:
                if self._inside:
                    return forward(*args, **kwargs)
                self._inside = True
                try:
                    output = forward(*args, **kwargs)
                finally:
                    self._inside = False
                self.outputs.append(output)
                if holds((args, kwargs), self._inputs):  # the last one: networks often follow a preparation
                    self._call = (part, args, kwargs)
                return output

            return spy

        return wrap

    def _embedding(self, forward: Spy) -> Spy:
        looked_up = False  # once a pass: tied weights may be read again for the output

        def spy(ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal looked_up
            if looked_up or not self._are_inputs(ids):
                return forward(ids, *args, **kwargs)
            looked_up = True
            if self._given is not None:
                return self._given
            if self.continuous is not None:
                return forward(ids, *args, **kwargs)
            found: Tensor = forward(ids, *args, **kwargs)
            if torch.is_grad_enabled() and not found.requires_grad:
                found = found.detach().requires_grad_()
            self.continuous = found
            return found

        return spy

    def _are_inputs(self, ids: Tensor) -> bool:
        if not isinstance(ids, Tensor) or ids.shape != self._inputs.shape or ids.is_floating_point():
            return False
        return ids.data_ptr() == self._inputs.data_ptr() or torch.equal(ids, self._inputs.to(ids.device))


@contextmanager
def _spied(part: nn.Module, wrap: Callable[[Spy], Spy]) -> Iterator[None]:
    """Replace ``part.forward`` for a while. Not a hook: on some modules a hook alone changes how they compute."""
    if isinstance(part, torch.jit.ScriptModule) or not _has_forward(part):
        yield
        return
    own = vars(part).get("forward")
    spy = wrap(part.forward)
    object.__setattr__(part, "forward", spy)
    try:
        yield
    finally:
        if vars(part).get("forward") is spy:
            object.__delattr__(part, "forward")
            if own is not None:
                object.__setattr__(part, "forward", own)


def _has_forward(part: nn.Module) -> bool:
    return "forward" in vars(part) or type(part).forward is not nn.Module.forward
