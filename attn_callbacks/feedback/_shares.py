"""Cells of the training data (classes, or classes within groups): their recalls, their shares, and what to say of them.

A report names what validation has, a sampler what training has; either may lack a class or a group of the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attn_callbacks.bias import BiasReport
from attn_callbacks.feedback.action import Action

__all__ = ["limited_shares", "measured_cells", "share_actions"]

_WORTH_SAYING = 0.005  # relative change of a share
_MAX_SENTENCES = 12


def measured_cells(report: BiasReport, by: str, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return recall and support of the cells of training, NaN and 0 where validation lacks one.

    Args:
        report: What validation showed.
        by: ``"class"`` or ``"group"``.
        shape: Groups and classes of training.

    Returns:
        Both ``(cells,)``: the classes, or the groups one after the other.
    """
    if by == "class":
        return _fitted(report.recall, shape[1:], math.nan), _fitted(report.class_support, shape[1:], 0)
    if not report.has_groups:
        raise ValueError("by='group' needs groups in the report, got none. Give the batch schema a `group`.")
    return _fitted(report.cell_recall, shape, math.nan).flatten(), _fitted(report.support, shape, 0).flatten()


def limited_shares(wanted: Tensor, natural: Tensor, limit: float) -> Tensor:
    """Scale ``wanted`` to shares of sum 1 of which none exceeds ``limit`` times the natural one.

    Args:
        wanted: What the shares shall be proportional to; above 0 where ``natural`` is; ``(cells,)``.
        natural: Shares of sum 1, ``(cells,)``.
        limit: Above 1.

    Example:
        >>> limited_shares(torch.ones(3), torch.tensor([0.80, 0.18, 0.02]), 10.0)
        tensor([0.4000, 0.4000, 0.2000])
    """
    most = limit * natural
    full = torch.zeros_like(natural, dtype=torch.bool)
    shares = wanted / wanted.sum()
    for _ in range(len(natural)):  # a cell that is full leaves more to the others, which may fill another
        over = (shares > most) & ~full
        if not bool(over.any()):
            break
        full |= over
        rest = wanted.where(~full, 0.0)
        shares = most.where(full, rest * ((1 - most[full].sum()) / rest.sum()))
    return shares


def share_actions(
    report: BiasReport, by: str, shape: tuple[int, int], before: Sequence[float], after: Sequence[float]
) -> tuple[Action, ...]:
    """Say which shares changed noticeably; of many, the largest changes.

    Args:
        report: Has the names, and the findings that are answered by a share that rose.
        by: ``"class"`` or ``"group"``.
        shape: Groups and classes of training.
        before: Share of each cell before, ``(cells,)``.
        after: Share of each cell after, ``(cells,)``.
    """
    classes = _names(report.class_names, shape[1])
    groups = _names(report.group_names if report.has_groups else (), shape[0])
    cells = [("", label) for label in classes] if by == "class" else [(g, label) for g in groups for label in classes]
    changes = [abs(new - old) / max(old, new, 1e-300) for old, new in zip(before, after, strict=True)]
    told = sorted((i for i, change in enumerate(changes) if change > _WORTH_SAYING), key=lambda i: -changes[i])
    actions = [_action(report, *cells[index], before[index], after[index]) for index in told[:_MAX_SENTENCES]]
    if len(told) > _MAX_SENTENCES:
        actions.append(Action(f"{len(told) - _MAX_SENTENCES} other shares of draws changed less"))
    return tuple(actions)


def _action(report: BiasReport, group: str, label: str, old: float, new: float) -> Action:
    cell = f"{group}, {label}" if group else label
    places = [("group", cell), ("group", group), ("class", label)] if group else [("class", label)]
    found = {finding.key for finding in report.findings}
    answered = next((place for place in places if place in found), None) if new > old else None
    return Action(f"{cell}: share of draws {old:.3f} -> {new:.3f}", answered, old, new)


def _names(known: Sequence[str], size: int) -> list[str]:
    return [known[index] if index < len(known) else str(index) for index in range(size)]


def _fitted(values: Tensor, shape: tuple[int, ...], fill: float) -> Tensor:
    fitted = values.new_full(shape, fill)
    both = tuple(slice(min(have, want)) for have, want in zip(values.shape, shape, strict=True))
    fitted[both] = values[both]
    return fitted
