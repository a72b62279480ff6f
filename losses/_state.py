"""State of a loss that a checkpoint carries, and that a checkpoint of a plain criterion may lack."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

__all__ = ["allow_missing_state"]


def allow_missing_state(loss: nn.Module) -> None:
    """Let ``loss`` load, strictly, from a checkpoint that has no state for it at all; the initial state then stays.

    A run that began with ``nn.CrossEntropyLoss`` can so go on with a loss that keeps weights. Says so in a warning,
    since a resumed run would be another one. A checkpoint with a part of the state, or with state that another loss
    left in the same place, is still refused.

    Args:
        loss: Module whose own buffers and parameters are meant, not those of its children: call it on a
            ``nn.ParameterDict`` too.
    """
    loss.register_load_state_dict_pre_hook(_fill_in)


def _fill_in(loss: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    if any(name.startswith(prefix) for name in state_dict):
        return
    own = {prefix + name: value for name, value in loss.state_dict().items() if "." not in name}
    if not own:
        return
    warnings.warn(
        f"The checkpoint holds no state of {type(loss).__name__} ({', '.join(own)}), as if another criterion had "
        "written it: the loss keeps the state it has.",
        stacklevel=2,
    )
    state_dict.update(own)
