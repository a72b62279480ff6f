"""Put another tensor in the place of one, wherever it is in a batch or in the arguments of a call."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["holds", "substitute"]


def substitute(whole: Any, old: Tensor, new: Tensor) -> Any:
    """Return ``whole`` with ``new`` where it holds the very tensor ``old``; nothing of ``whole`` is changed.

    Looks into mappings, lists, tuples and named tuples; what holds nothing of it comes back as it is.

    Example:
        >>> import torch
        >>> inputs, target = torch.zeros(2), torch.ones(2)
        >>> substitute({"inputs": (inputs, target)}, inputs, target)
        {'inputs': (tensor([1., 1.]), tensor([1., 1.]))}
    """
    if whole is old:
        return new
    if isinstance(whole, Mapping):
        changed = {key: substitute(part, old, new) for key, part in whole.items()}
        return whole if all(changed[key] is part for key, part in whole.items()) else _like(whole, changed)
    if isinstance(whole, (list, tuple)):
        parts = [substitute(part, old, new) for part in whole]
        if all(mine is part for mine, part in zip(parts, whole, strict=True)):
            return whole
        return type(whole)(*parts) if hasattr(whole, "_fields") else type(whole)(parts)
    return whole


def holds(whole: Any, tensor: Tensor) -> bool:
    """Say whether ``tensor`` itself, not an equal one, is somewhere in ``whole``."""
    if isinstance(whole, Mapping):
        return any(holds(part, tensor) for part in whole.values())
    if isinstance(whole, (list, tuple)):
        return any(holds(part, tensor) for part in whole)
    return whole is tensor


def _like(whole: Mapping[Any, Any], changed: dict[Any, Any]) -> Any:
    """Keep the type of a mapping: the batches of tokenizers have attributes as well."""
    if type(whole) is dict:
        return changed
    twin = copy.copy(whole)
    for key, value in changed.items():
        twin[key] = value  # type: ignore[index]
    return twin
