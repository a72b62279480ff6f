"""Batches as an experiment can use them, whoever made them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping
from typing import Any

from torch import Tensor

__all__ = ["outside_inference"]


def outside_inference(batch: Any) -> Any:
    """Return a batch with copies of tensors that were made in inference mode: no gradient can pass by those.

    Looks into tuples, lists and mappings; a batch without such tensors, and anything else, is returned as it is.

    Args:
        batch: Whatever a loss understands.

    Example:
        >>> import torch
        >>> with torch.inference_mode():
        ...     batch = {"tokens": torch.ones(2), "names": ["a", "b"]}
        >>> usable = outside_inference(batch)
        >>> usable["tokens"].is_inference(), usable["names"] is batch["names"]
        (False, True)
    """
    if isinstance(batch, Tensor):
        return batch.clone() if batch.is_inference() else batch
    if isinstance(batch, MutableMapping):
        return _mapping(batch)
    if not isinstance(batch, (tuple, list)):
        return batch
    parts = [outside_inference(part) for part in batch]
    if all(new is old for new, old in zip(parts, batch, strict=True)):
        return batch
    return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)


def _mapping(batch: MutableMapping[Any, Any]) -> Mapping[Any, Any]:
    parts = {key: outside_inference(part) for key, part in batch.items()}
    changed = {key: part for key, part in parts.items() if part is not batch[key]}
    if not changed:
        return batch
    own = copy.copy(batch)  # of its own type: batches of tokenisers have methods
    for key, part in changed.items():
        own[key] = part
    return own
