"""Which keys and which rows of attention count: masks in, after checking them; rows that are padding or empty out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from losses._checks import accumulation_dtype, check_shape, check_within

__all__ = [
    "FLOOR",
    "Allowed",
    "allowed_keys",
    "any_seen",
    "as_mask",
    "check_query_valid",
    "check_valid",
    "counted_rows",
    "real_rows",
]

FLOOR = 2.0**-20  # no weight to speak of: the least sum of a row that counts, the least share under a logarithm
_CLEARLY = 1e-3  # further off than rounding takes a sum of weights in half precision
_MASK_ADVICE = (
    "It is an attention mask of ones (real) and zeros (padding), or boolean; for one that is added to the scores, pass "
    "`mask >= 0`."
)


def as_mask(name: str, mask: Tensor) -> Tensor:
    """Return ``mask``, called ``name``, as boolean, after checking (on the CPU only) that it lies in ``[0, 1]``."""
    if mask.dtype == torch.bool:
        return mask
    check_within(name, mask.detach(), 0, 1, advice=_MASK_ADVICE)
    return mask > 0  # where nothing is checked, a mask that is added to scores is then empty, not inverted


def check_valid(valid: Tensor | None, layer: Tensor) -> Tensor | None:
    """Return ``valid`` as a boolean ``(batch, keys)``, after checking it against ``layer``."""
    if valid is None:
        return None
    check_shape("valid", valid, (layer.shape[0], layer.shape[3]), "(batch, keys)")
    return as_mask("valid", valid)


def check_query_valid(query_valid: Tensor | None, layers: Sequence[Tensor]) -> Tensor | None:
    """Return ``query_valid`` as a boolean ``(batch, queries)``, after checking it against every layer."""
    if query_valid is None:
        return None
    for index, layer in enumerate(layers):
        expected = layer.shape[0], layer.shape[2]
        check_shape("query_valid", query_valid, expected, f"(batch, queries) of `weights[{index}]`")
    return as_mask("query_valid", query_valid)


def real_rows(layer: Tensor, valid: Tensor | None, query_valid: Tensor | None) -> Tensor | None:
    """Return which rows are those of real tokens, ``(batch, 1, queries)``; ``None``: all, or it cannot be known.

    In self-attention queries are the tokens that keys are, so ``valid`` tells; in cross-attention it does not.
    """
    if query_valid is not None:
        return query_valid[:, None, :]
    if valid is None or layer.shape[2] != layer.shape[3]:
        return None
    return valid[:, None, :]


class Allowed(NamedTuple):
    """Which keys each row of a layer may attend to."""

    keys: Tensor | None  # (batch or 1, heads or 1, queries or 1, keys), True = may attend; None: all
    number: Tensor  # how many they are, broadcastable to (batch, heads, queries), in the dtype of sums over weights
    rows: Tensor  # rows of real tokens that have a choice, at least two keys; broadcastable to (batch, heads, queries)


def allowed_keys(valid: Tensor | None, query_valid: Tensor | None, layer: Tensor) -> Allowed:
    """Return which keys of ``layer`` count, from a key mask or from a mask of query-key pairs.

    Args:
        valid: ``True`` for real tokens, or where a query may attend; ``None`` allows every pair.
        query_valid: ``True`` for real tokens among the queries; ``None``: see :func:`real_rows`.
        layer: Attention weights of one layer.

    Shape:
        - valid: ``(batch, keys)``, or ``(batch or 1, heads or 1, queries, keys)``
        - query_valid: ``(batch, queries)``
        - layer: ``(batch, heads, queries, keys)``

    Raises:
        ValueError: If the shape of ``valid`` does not fit or (checked on the CPU only) it has values outside
            ``[0, 1]``.
    """
    dtype, real = accumulation_dtype(layer), None
    if valid is None:
        keys, number = None, torch.full((1, 1, 1), layer.shape[3], dtype=dtype, device=layer.device)
    elif isinstance(valid, Tensor) and valid.dim() == 4:
        keys = _pairs(valid, layer)
        number = keys.sum(dim=-1, dtype=dtype)
    else:
        check_shape("valid", valid, (layer.shape[0], layer.shape[3]), "(batch, keys)")
        real = as_mask("valid", valid)
        keys, number = real[:, None, None, :], real.sum(dim=-1, dtype=dtype)[:, None, None]
    rows = real_rows(layer, real, query_valid)
    return Allowed(keys, number, number > 1 if rows is None else rows & (number > 1))


def counted_rows(total: Tensor, rows: Tensor | None, *shares: Tensor) -> Tensor:
    """Return which rows count: those of real tokens that attend to something, or to NaN, which must reach the loss.

    Args:
        total: Sum of each row over real keys.
        rows: ``True`` for the rows of real tokens; ``None``: all.
        shares: The share of each row on some sets of keys.

    Shape:
        - total, shares: ``(batch, heads, rows)``
        - rows: broadcastable to it
        - output: as the two together

    Raises:
        ValueError: If a real row has (checked on the CPU only) sums that no attention has.
    """
    counted = ~(total <= FLOOR)
    if total.device.type == "cpu" and not torch.compiler.is_compiling():
        off = total < -_CLEARLY
        for share in shares:
            off = off | (counted & ((share < -_CLEARLY) | (share > 1 + _CLEARLY)))
        if any_seen(off if rows is None else off & rows):
            raise ValueError(
                "`weights` must be attention after the softmax, got rows with negative weights. Pass "
                "`scores.softmax(dim=-1)` where the model returns scores."
            )
    return counted if rows is None else counted & rows


def any_seen(found: Tensor) -> bool:
    """Return whether any value is true, if that can be told for nothing: as :func:`losses._checks.check_within`."""
    if found.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    try:
        return bool(found.any())
    except RuntimeError:  # inside `torch.func.vmap`
        return False


def _pairs(valid: Tensor, layer: Tensor) -> Tensor:
    (batch, heads), (queries, keys) = valid.shape[:2], layer.shape[2:]
    if batch not in (1, layer.shape[0]) or heads not in (1, layer.shape[1]) or valid.shape[2:] != (queries, keys):
        raise ValueError(
            f"`valid` must have shape (batch or 1, heads or 1, queries, keys) = {tuple(layer.shape)}, got "
            f"{tuple(valid.shape)}."
        )
    return as_mask("valid", valid)
