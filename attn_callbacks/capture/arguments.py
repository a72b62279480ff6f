"""Checks of what a call is asked with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attn_callbacks._checks import check_number

__all__ = ["check_order", "check_same_tokens", "feature_columns", "sample_widths"]

Shape = tuple[int, int, int, int]


def feature_columns(features: Tensor, shape: Shape, device: torch.device) -> Tensor:
    """Give features of keys the axes ``(batch | 1, heads | 1, keys, features)``."""
    if not isinstance(features, Tensor) or features.is_complex():
        got = features.dtype if isinstance(features, Tensor) else type(features).__name__
        raise TypeError(f"`features` must be a tensor of real numbers, got {got}.")
    if features.device != device:
        raise ValueError(f"`features` must be on the device of the call, {device}, got {features.device}.")
    batch, heads, _, keys = shape
    columns = features[None, None] if features.ndim == 2 else features
    fits = columns.ndim == 4 and columns.shape[0] in (1, batch) and columns.shape[1] in (1, heads)
    if not fits or columns.shape[2] != keys:
        raise ValueError(
            f"`features` must have shape (keys, features) = ({keys}, features) or ({batch}, {heads}, {keys}, "
            f"features), got {tuple(features.shape)}."
        )
    return columns


def sample_widths(width: Tensor, batch: int) -> Tensor:
    """Give a width of each sample, in tokens, the axes ``(batch, 1)``."""
    if width.shape != (batch,):
        raise ValueError(f"`width` must have shape (batch,) = ({batch},), got {tuple(width.shape)}.")
    if width.is_floating_point() or width.is_complex() or width.dtype == torch.bool:
        raise TypeError(f"`width` must hold integers, numbers of tokens, got {width.dtype}.")
    if width.device.type == "cpu" and bool((width < 0).any()):  # elsewhere a look would wait for the device
        raise ValueError(f"`width` must be at least 0, got {int(width.min())}.")
    return width[:, None].long().clamp(0, 2**31)


def check_same_tokens(name: str, shape: Shape, is_cross: bool) -> None:
    """Raise unless queries and keys are the same tokens, whose positions can be compared."""
    _, _, queries, keys = shape
    if is_cross or queries != keys:
        raise ValueError(
            f"`{name}` compares positions of queries and keys, and here they are not the same tokens: "
            f"{'cross-attention of ' if is_cross else ''}{queries} queries and {keys} keys."
        )


def check_order(order: float) -> None:
    """Raise unless a Rényi entropy of this order can be computed in float32."""
    check_number("order", order)
    if not 0 < order < math.inf:
        raise ValueError(f"`order` must be above 0 and finite, got {order}.")
    if order != 1 and abs(order - 1) < 0.01:
        raise ValueError(f"`order` must be 1 or differ from it by 0.01, or rounding would decide, got {order}.")
