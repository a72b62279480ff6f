"""State of a loss that a checkpoint carries, and that a checkpoint of another criterion may lack."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

__all__ = ["allow_missing_state"]


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
