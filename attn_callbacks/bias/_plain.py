"""What a report holds, as JSON can hold it."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

__all__ = ["plain"]


def plain(value: object) -> object:
    """Return numbers, strings, lists and dicts for tensors, tuples and mappings; NaN and infinity become ``None``."""
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
