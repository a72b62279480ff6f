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
        self._released: set[str] = set()
        self.register_state_dict_post_hook(_leave_out)  # type: ignore[no-untyped-call]
        allow_missing_state(self)

    def release_state(self, name: str) -> None:
        """Leave a buffer out of the state dict from now on, since whoever steers it keeps it; it still loads."""
        self._released.add(name)

    @property
    def learning(self) -> bool:
        """Whether a call may change the state: in training mode, and with gradients, so not in a validation loop."""
        return self.training and torch.is_grad_enabled()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StatefulLoss:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and accumulation_dtype(new) != new.dtype:
                # half precision would lose small steps and large sums, once and for all
                self._buffers[name] = old.to(new.device, accumulation_dtype(new))
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


def _leave_out(loss: nn.Module, state_dict: dict[str, Any], prefix: str, _: object) -> None:
    for name in getattr(loss, "_released", ()):
        state_dict.pop(prefix + name, None)


def _fill_in(loss: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    for name in getattr(loss, "_released", ()):
        state_dict.setdefault(prefix + name, loss.get_buffer(name))
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
