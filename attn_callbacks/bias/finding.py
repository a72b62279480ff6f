"""Findings: the shortfalls that are too large to be chance, each with its kind, its size and one sentence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_callbacks.bias.rates import rate_error, shortfall
from attn_callbacks.bias.share import AttentionShare

__all__ = ["Finding", "attention_findings", "cell_findings", "rate_findings"]

DEAD_BAND = 0.02
ERRORS = 2.0


@dataclass(frozen=True)
class Finding:
    """One bias that was measured.

    Args:
        kind: ``"class"`` (a class is recognised less often than others), ``"group"`` (a group, or a class within a
            group, fares worse than in other groups) or ``"attention"`` (attention leans on spurious tokens, or passes
            over relevant ones). Feedback acts on the kinds it can cure.
        where: Name of the class or group, or ``"group, class"``.
        size: How much is missing: recall or accuracy below the mean of the peers, or attention mass off chance. In
            (0, 1].
        standard_error: Standard error of ``size``.
        support: Number of samples behind it.
        text: One sentence.

    Example:
        >>> Finding("class", "cat", 0.3, 0.05, 40, "Class cat: ...").size
        0.3
    """

    kind: str
    where: str
    size: float
    standard_error: float
    support: int
    text: str


def rate_findings(kind: str, names: Sequence[str], rates: Tensor, support: Tensor, minimum: int) -> Iterator[Finding]:
    """Yield classes or groups whose recall or accuracy lies below that of their peers.

    Args:
        kind: ``"class"`` or ``"group"``.
        names: Name of each class or group.
        rates: Recalls or accuracies, ``(names,)``.
        support: Number of samples of each, ``(names,)``.
        minimum: Least support that can be compared.
    """
    quantity, peers = ("recall", "classes") if kind == "class" else ("accuracy", "groups")
    size, error = shortfall(rates, rate_error(rates, support), support >= minimum)
    for (index,) in _beyond_chance(size, error):
        text = (
            f"{kind.capitalize()} {names[index]}: {quantity} {rates[index]:.2f} on {support[index]} samples, "
            f"{_amount(size[index], error[index])} below the mean of the other {peers}."
        )
        yield Finding(kind, names[index], float(size[index]), float(error[index]), int(support[index]), text)


def cell_findings(
    groups: Sequence[str], classes: Sequence[str], rates: Tensor, support: Tensor, minimum: int
) -> Iterator[Finding]:
    """Yield classes that are recognised less often within a group than the same class is in other groups.

    Group accuracy hides them where a group consists mostly of one class. A group that holds a single class is left out:
    its cell is the group.

    Args:
        groups: Name of each group.
        classes: Name of each class.
        rates: Recalls, ``(groups, classes)``.
        support: Number of samples, ``(groups, classes)``.
        minimum: Least support that can be compared.
    """
    size, error = shortfall(rates, rate_error(rates, support), support >= minimum)
    mixed = (support > 0).sum(dim=1, keepdim=True) > 1
    for group, label in _beyond_chance(size.where(mixed, torch.nan), error):
        cell = (group, label)
        text = (
            f"Group {groups[group]}, class {classes[label]}: recall {rates[cell]:.2f} on {support[cell]} samples, "
            f"{_amount(size[cell], error[cell])} below the same class in the other groups."
        )
        where = f"{groups[group]}, {classes[label]}"
        yield Finding("group", where, float(size[cell]), float(error[cell]), int(support[cell]), text)


def attention_findings(
    classes: Sequence[str], attention: Mapping[str, AttentionShare], minimum: int
) -> Iterator[Finding]:
    """Yield classes whose attention is above chance on spurious tokens, or below chance on relevant ones.

    Args:
        classes: Name of each class.
        attention: Attention by token set; sets other than ``"spurious"`` and ``"relevance"`` are not judged.
        minimum: Least support that can be compared.
    """
    for name, sign, side in (("spurious", 1.0, "above"), ("relevance", -1.0, "below")):
        share = attention.get(name)
        if share is None:
            continue
        error = share.mass_error
        size = (sign * (share.mass - share.chance)).where(share.support >= minimum, torch.nan)
        for (index,) in _beyond_chance(size, error):
            text = (
                f"Class {classes[index]}: {share.mass[index]:.2f} of the attention falls on {name} tokens, "
                f"{_amount(size[index], error[index])} {side} chance, on {share.support[index]} samples."
            )
            support = int(share.support[index])
            yield Finding("attention", classes[index], float(size[index]), float(error[index]), support, text)


def _beyond_chance(size: Tensor, error: Tensor) -> list[list[int]]:
    """Return the index of each entry that exceeds the dead band and its errors; NaN exceeds nothing."""
    indices: list[list[int]] = ((size > DEAD_BAND) & (size > ERRORS * error)).nonzero().tolist()
    return indices


def _amount(size: Tensor, error: Tensor) -> str:
    return f"{size:.2f} (standard error {error:.2f})"
