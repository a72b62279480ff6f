"""Checks of what a call is asked with."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_same_tokens", "feature_columns", "sample_widths"]

Shape = tuple[int, int, int, int]


def feature_columns(features: Tensor, shape: Shape) -> Tensor:
    """Give features of keys the axes ``(batch | 1, heads | 1, keys, features)``."""
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
    return width[:, None].long()


def check_same_tokens(name: str, shape: Shape, is_cross: bool) -> None:
    """Raise unless queries and keys are the same tokens, whose positions can be compared."""
    _, _, queries, keys = shape
    if is_cross or queries != keys:
        raise ValueError(
            f"`{name}` compares positions of queries and keys, and here they are not the same tokens: "
            f"{'cross-attention of ' if is_cross else ''}{queries} queries and {keys} keys."
        )
