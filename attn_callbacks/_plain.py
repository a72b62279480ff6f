"""What a result holds, as JSON can hold it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["plain"]


def plain(value: Any) -> Any:
    """Return numbers, strings, lists and dicts for tensors, arrays, tuples and mappings; NaN and infinity are ``None``.

    Args:
        value: What is to be written as JSON.

    Example:
        >>> plain({"mean": (1.0, float("nan")), "heads": [("layer", 0)]})
        {'mean': [1.0, None], 'heads': [['layer', 0]]}
    """
    if hasattr(value, "tolist"):  # a tensor, an array or a number of numpy: no library is loaded for them
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
