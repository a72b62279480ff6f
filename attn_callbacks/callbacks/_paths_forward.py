"""The forward of a validation step once more, with gradients, for its first samples alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from attn_callbacks.analysis._quiet import undisturbed
from attn_callbacks.callbacks._forward import ForwardCall
from attn_callbacks.callbacks._substitute import substitute
from attn_callbacks.capture.compiled import run_eagerly

__all__ = ["SampleForward", "differentiable"]


class SampleForward(ForwardCall):
    """Watches a step as `ForwardCall` does, and can make its call again for some samples, ready to be differentiated.

    Every layer has a graph then, also above frozen ones: what embeddings look up, and inputs that are no token ids,
    require a gradient. Parameters keep their flags.

    Args:
        module: A LightningModule.
        inputs: The inputs of the batch.
    """

    def __init__(self, module: nn.Module, inputs: Tensor) -> None:
        super().__init__(module, inputs, trace=False)

    def first(self, count: int, samples: int) -> Any:
        """Return what the call returns for the first ``count`` of ``samples``. Call it inside `differentiable`.

        Raises:
            ValueError: If there was no call.
        """
        if self._call is None:
            return self.again(self._inputs)  # says why there was none
        part, args, kwargs = self._call
        whole: Any = (args, kwargs)
        for tensor in _tensors(whole):
            whole = substitute(whole, tensor, self._cut(tensor, count, samples))
        with ExitStack() as stack:
            stack.enter_context(run_eagerly(self._module))
            for each in self._module.modules():
                if isinstance(each, nn.Embedding):
                    stack.callback(each.register_forward_hook(_require_gradient).remove)
            return part(*whole[0], **whole[1])

    def _cut(self, tensor: Tensor, count: int, samples: int) -> Tensor:
        rows = tensor[:count] if tensor.ndim and len(tensor) == samples else tensor
        rows = rows.detach().clone()  # validation may have made it where nothing can be differentiated
        return rows.requires_grad_() if tensor is self._inputs and rows.is_floating_point() else rows


@contextmanager
def differentiable(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation, with gradients, for a while.

    Its modes, its buffers and the global random generators are afterwards as they were.

    Args:
        module: The module.
    """
    with undisturbed(module), torch.enable_grad(), _other_buffers(module):
        yield


@contextmanager
def _other_buffers(module: nn.Module) -> Iterator[None]:
    """Let a module work on copies of its buffers; what it counts or averages in them is not kept."""
    own = [(part, name, found) for part in module.modules() for name, found in part._buffers.items()]
    copies = {id(found): found.detach().clone() for _, _, found in own if found is not None}  # shared ones stay shared
    try:
        for part, name, found in own:
            part._buffers[name] = None if found is None else copies[id(found)]
        yield
    finally:
        for part, name, found in own:
            part._buffers[name] = found


def _tensors(whole: Any) -> list[Tensor]:
    if isinstance(whole, Tensor):
        return [whole]
    parts = whole.values() if isinstance(whole, Mapping) else whole if isinstance(whole, (list, tuple)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _require_gradient(_module: nn.Module, _args: Any, found: Tensor) -> Tensor:
    return found if found.requires_grad else found.detach().requires_grad_()
