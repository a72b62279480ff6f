"""Feedback that remembers which module it was bound to, without keeping it alive."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from attn_callbacks.feedback.base import Feedback

__all__ = ["BoundFeedback", "check_loss", "find_at"]


class BoundFeedback(Feedback):
    """Base of feedback with a memory of its module: in another module than the last one it starts anew."""

    _reference: weakref.ref[nn.Module] | None = None

    def bind(self, module: nn.Module) -> None:
        """Find in the module what will be changed; a module other than the last one starts anew.

        Args:
            module: The LightningModule.

        Raises:
            ValueError: If what is needed is not there.
        """
        self._look_into(module)
        if self._reference is not None and self._module is not module:
            self._start_anew()
        self._reference = weakref.ref(module)
        self._take_up(module)

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_reference": None}  # a copy in another process binds to the module there

    @property
    def _module(self) -> nn.Module | None:
        return None if self._reference is None else self._reference()

    def _look_into(self, module: nn.Module) -> None:
        """Raise if the module lacks what is needed; nothing may change yet."""

    def _start_anew(self) -> None:
        """Forget what was learned in another module."""

    def _take_up(self, module: nn.Module) -> None:
        """Begin, or go on, with the module."""


def find_at(module: nn.Module, path: str, wanted: str) -> Any:
    """Return what lies at a dotted path below a module.

    Args:
        module: The training module.
        path: Dotted path; parts of an ``nn.Sequential`` are numbers.
        wanted: What should be there, for the error.

    Raises:
        ValueError: If there is nothing.

    Example:
        >>> find_at(nn.Sequential(nn.Linear(2, 3)), "0.bias", "a parameter").shape
        torch.Size([3])
    """
    found: object = module
    for part in path.split("."):
        found = getattr(found, part, None)
    if found is None:
        raise ValueError(
            f"Expected {wanted} at `{path}` of {type(module).__name__}, got no such attribute. Create it in "
            "`__init__`, or pass its path."
        )
    return found


def check_loss(name: str, loss: nn.Module, example: str) -> nn.Module:
    """Return ``loss`` if it is a module that no optimiser would have to train.

    Args:
        name: What an error calls it.
        loss: A loss or penalty.
        example: What to pass, for the error.

    Raises:
        TypeError: If it is no module.
        ValueError: If it has learnable parameters.
    """
    if not isinstance(loss, nn.Module):
        raise TypeError(f"`{name}` must be a module such as `{example}`, got {loss!r}.")
    if any(True for _ in loss.parameters()):
        raise ValueError(
            f"`{name}` must have no learnable parameters, got {type(loss).__name__} with some: no optimizer would "
            "train them. Call it in `training_step` instead."
        )
    return loss
