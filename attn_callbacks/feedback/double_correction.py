"""Tell when several corrections add up to more than balance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attn_callbacks._checks import check_axes

__all__ = ["double_correction", "effective_prior"]

_LIFTED = 1.1  # a factor below says nothing


def effective_prior(counts: Tensor, weights: Tensor | None = None, adjustment: Tensor | None = None) -> Tensor:
    r"""Return the shares of the cells as a loss sees them: what is fed, times what it weighs.

    .. math::
        p_{gc} \propto n_{gc}\, w_{gc}\, e^{-a_{gc}}

    A margin counts because training on ``logits + log(prior)`` makes the logits those of data divided by that prior.

    Args:
        counts: Samples that training is fed, or their shares.
        weights: Weights in the loss; ``None``: all alike.
        adjustment: What the loss adds to the logits in training (``losses.LogitAdjustedLoss``); ``None``: nothing.

    Shape:
        - counts: ``(groups, classes)``
        - weights: ``(classes,)`` or ``(groups, classes)``
        - adjustment: ``(classes,)`` or ``(groups, classes)``
        - output: ``(groups, classes)``, of sum 1; float64, on the CPU

    Raises:
        ValueError: If shapes do not fit together, or nothing is fed.

    Example:
        >>> effective_prior(torch.tensor([[0.9, 0.1]]), weights=torch.tensor([1.0, 9.0]))
        tensor([[0.5000, 0.5000]], dtype=torch.float64)
    """
    fed = _shares("counts", counts)
    return _normalized(fed * _weight_factor(fed, weights) * _margin_factor(fed, adjustment))


def double_correction(
    natural: Tensor,
    fed: Tensor,
    weights: Tensor | None = None,
    adjustment: Tensor | None = None,
    *,
    classes: Sequence[str],
    groups: Sequence[str] | None = None,
    factor: float = 2.0,
) -> str | None:
    """Say which rare cell is lifted by more than one means, and beyond balance.

    Sampling, loss weights and logit margins each multiply the share of a cell (:func:`effective_prior`). One of them
    can balance it; two do so twice. A cell is reported when it is rarer than balance, at least two means lift it by a
    tenth, and its odds are then more than ``factor`` times those of balance: 1 to the number of other cells.

    Args:
        natural: Samples there are, or their shares; a cell without any is left out.
        fed: Samples that training is fed, or their shares: equal to ``natural`` without a sampler.
        weights: Weights in the loss; ``None``: all alike.
        adjustment: What the loss adds to the logits in training; ``None``: nothing.
        classes: Name of each class.
        groups: Name of each group; ``None``: there are none, and one row.
        factor: How far beyond balance is too far.

    Shape:
        - natural, fed: ``(groups, classes)``
        - weights: ``(classes,)`` or ``(groups, classes)``
        - adjustment: ``(classes,)`` or ``(groups, classes)``

    Returns:
        A sentence about the cell that is furthest beyond; ``None`` if there is none.

    Raises:
        ValueError: If shapes do not fit together, or nothing is fed.

    Example:
        >>> double_correction(
        ...     torch.tensor([[900, 100]]),
        ...     torch.tensor([[0.5, 0.5]]),
        ...     torch.tensor([0.2, 1.8]),
        ...     classes=("ham", "spam"),
        ... )
        'Class spam is corrected more than once: its share is multiplied by sampling (5.0) and class weights (1.8), ...
    """
    there, given = _shares("natural", natural), _shares("fed", fed)
    _check_named(there, given, len(classes), None if groups is None else len(groups))
    effective = effective_prior(given, weights, adjustment)
    lifts = {
        "sampling": given / there,
        "class weights": _relative(_weight_factor(given, weights), given),
        "the logit adjustment": _relative(_margin_factor(given, adjustment), given),
    }
    balance = 1 / int((there > 0).sum())
    beyond = _odds(effective) / _odds(torch.tensor(balance, dtype=torch.float64))
    several = torch.stack([lift > _LIFTED for lift in lifts.values()]).sum(dim=0) > 1
    beyond = beyond.where(several & (there > 0) & (there < balance), 0.0)
    if not float(beyond.max()) > factor:
        return None
    row, column = divmod(int(beyond.argmax()), len(classes))
    return _sentence(
        f"Class {classes[column]}" if groups is None else f"{_group(groups[row])}, class {classes[column]}",
        {name: float(lift[row, column]) for name, lift in lifts.items()},
        float(effective[row, column]),
        balance,
    )


def _check_named(there: Tensor, given: Tensor, classes: int, groups: int | None) -> None:
    if there.shape != given.shape or there.shape != (1 if groups is None else groups, classes):
        raise ValueError(
            f"`natural` and `fed` must have shape (groups, classes) as named, got {tuple(there.shape)} and "
            f"{tuple(given.shape)} for {classes} `classes` and {'no' if groups is None else groups} `groups`."
        )


def _sentence(cell: str, lifts: Mapping[str, float], share: float, balance: float) -> str:
    means = " and ".join(f"{name} ({lift:.1f})" for name, lift in lifts.items() if lift > _LIFTED)
    return (
        f"{cell} is corrected more than once: its share is multiplied by {means}, as if {share:.2f} of the data "
        f"were of it, where {balance:.2f} is balance. Keep one of them."
    )


def _group(name: str) -> str:
    return name.capitalize() if name.startswith("group ") else f"Group {name}"


def _shares(name: str, counts: Tensor) -> Tensor:
    check_axes(name, counts, 2)
    return _normalized(counts.detach().cpu().double(), name)


def _normalized(values: Tensor, name: str = "counts") -> Tensor:
    total = values.sum()
    if not float(total) > 0:
        raise ValueError(f"`{name}` must have a cell above 0, got none.")
    return values / total


def _weight_factor(fed: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return torch.ones_like(fed)
    if tuple(weights.shape) not in (tuple(fed.shape), tuple(fed.shape[1:])):
        raise ValueError(
            f"`weights` must have shape {tuple(fed.shape[1:])} or {tuple(fed.shape)}, got {tuple(weights.shape)}."
        )
    return weights.detach().cpu().double().expand_as(fed)


def _margin_factor(fed: Tensor, adjustment: Tensor | None) -> Tensor:
    if adjustment is None:
        return torch.ones_like(fed)
    if tuple(adjustment.shape) not in (tuple(fed.shape), tuple(fed.shape[1:])):
        raise ValueError(
            f"`adjustment` must have shape {tuple(fed.shape[1:])} or {tuple(fed.shape)}, got {tuple(adjustment.shape)}."
        )
    margin = -adjustment.detach().cpu().double().expand_as(fed)
    known = margin.where(fed > 0, -torch.inf)  # the margin of a class that is not fed can be infinite
    return (known - known.max()).exp()


def _relative(factor: Tensor, fed: Tensor) -> Tensor:
    return factor / (factor * fed).sum()


def _odds(share: Tensor) -> Tensor:
    return share / (1 - share)
