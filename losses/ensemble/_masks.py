"""The features that each member of an ensemble is allowed to see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from losses._checks import check_tensor

__all__ = ["Masks", "feature_masks", "masked_views"]

Masks = Tensor | Sequence[Sequence[Any]]


def feature_masks(masks: Masks | None, members: int) -> Tensor | None:
    """Return the masks as a boolean tensor, after checking that every member sees something.

    Shape:
        - masks: ``(members, features...)``, nonzero = the member sees the feature

    Raises:
        ValueError: If the shape does not fit, or a member sees nothing.
    """
    if masks is None:
        return None
    table = torch.as_tensor(masks) != 0
    if table.dim() < 2 or table.shape[0] != members:
        raise ValueError(
            f"`masks` must have shape (members, features...) = ({members}, ...), got {tuple(table.shape)}."
        )
    blind = ~table.flatten(1).any(dim=1)
    if bool(blind.any()):
        raise ValueError(f"`masks` must leave every member a feature, got none for member {int(blind.int().argmax())}.")
    return table


def masked_views(inputs: Tensor, masks: Tensor | None, members: int) -> Tensor:
    """Return what each member sees of ``inputs``, with zeros in place of the rest.

    Args:
        inputs: What all members are called with.
        masks: Masks of :func:`feature_masks`; ``None`` hides nothing.
        members: Number of members.

    Shape:
        - inputs: ``(batch, ..., features...)``
        - masks: ``(members, features...)``, aligned with the last axes of ``inputs``; an axis may have size 1
        - output: ``(members, batch, ..., features...)``

    Raises:
        ValueError: If the features do not fit.
        TypeError: If ``inputs`` is no tensor.
    """
    check_tensor("inputs", inputs)
    if masks is None:
        return inputs.expand(members, *inputs.shape)
    features = masks.shape[1:]
    last = inputs.shape[1:][-len(features) :]
    if len(last) != len(features) or any(mine not in (1, given) for mine, given in zip(features, last, strict=True)):
        raise ValueError(
            f"`inputs` must have shape (batch, ..., features...) with the features {tuple(features)} of `masks`, got "
            f"{tuple(inputs.shape)}."
        )
    between = [1] * (inputs.dim() - len(features))
    hidden = ~masks.reshape(members, *between, *features)
    return inputs.expand(members, *inputs.shape).masked_fill(hidden, 0)  # not a product: hides NaN as well
