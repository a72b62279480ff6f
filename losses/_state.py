"""State of a loss that a checkpoint carries, and that a checkpoint of another criterion may lack."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from losses._checks import accumulation_dtype

__all__ = ["StatefulLoss", "allow_missing_state"]


class StatefulLoss(nn.Module):
    """Base of the losses with state: it is learned in training only, kept in float32, and a checkpoint may lack it."""

    def __init__(self) -> None:
        super().__init__()
        allow_missing_state(self)

    @property
    def learning(self) -> bool:
        """Whether a call may change the state: in training mode, and with gradients, so not in a validation loop."""
        return self.training and torch.is_grad_enabled()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StatefulLoss:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.is_floating_point():  # half precision would lose small steps, large sums
                self._buffers[name] = buffer.to(accumulation_dtype(buffer))
        return self


def allow_missing_state(loss: nn.Module) -> None:
    """Let ``loss`` load, strictly, from a checkpoint that lacks state of it; what is missing then stays as it is.

    A run that began with ``nn.CrossEntropyLoss`` can so go on with a loss that keeps weights, and weights that a
    callback keeps need not lie in the checkpoint of the model. Says so in a warning, since a resumed run would be
    another one. State that another loss left in the same place is still refused, as unexpected.

    Args:
        loss: Module whose own buffers and parameters are meant, not those of its children: call it on a
            ``nn.ParameterDict`` too.
    """
    loss.register_load_state_dict_pre_hook(_fill_in)


def _fill_in(loss: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    own = {prefix + name: value for name, value in loss.state_dict().items() if "." not in name}
    missing = {name: value for name, value in own.items() if name not in state_dict}
    if not missing:
        return
    warnings.warn(
        f"The checkpoint lacks state of {type(loss).__name__} ({', '.join(missing)}): another criterion wrote it, or a "
        "callback keeps it. The loss keeps the state it has.",
        stacklevel=2,
    )
    state_dict.update(missing)
