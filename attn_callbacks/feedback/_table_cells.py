"""A bias report as plain numbers in the order of a table of weights, and what changed in that table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_callbacks.bias import BiasReport
from attn_callbacks.feedback.action import Action

__all__ = ["Cells", "changes", "read_cells"]

_WORTH_SAYING = 0.005  # relative change of a weight
_MOST_ACTIONS = 12

Key = tuple[str, str]


@dataclass(frozen=True)
class Cells:
    """What is known of each cell: a class, a group, or a class within a group, group by group.

    Args:
        recall: Share that is right; NaN where nothing was measured.
        support: Validation samples behind it.
        prior: Share of what training was fed, or without that of validation.
        counts: Samples that training was fed in one epoch; 0 where that is not known.
        loss: Mean loss in validation; ``None`` where it was not measured.
        names: Name of each cell that the report has; there may be further rows in the table.
        keys: Findings that a change of the cell may answer, the closest first.
    """

    recall: tuple[float, ...]
    support: tuple[int, ...]
    prior: tuple[float, ...]
    counts: tuple[float, ...]
    loss: tuple[float, ...] | None
    names: tuple[str, ...]
    keys: tuple[tuple[Key, ...], ...]


def read_cells(report: BiasReport, by: str, shape: tuple[int, ...], where: str, called: str = "") -> Cells:
    """Read a report class by class, group by group or cell by cell.

    Args:
        report: What a validation pass showed.
        by: ``"class"``, ``"group"`` or ``"cell"``.
        shape: Shape of the table: ``(classes,)``, or ``(groups, classes)``.
        where: Name of the table, for the message.
        called: What the user calls ``by``, for the message; the same if empty.

    Raises:
        ValueError: If the report has no groups where they are needed, or does not fit the table.
    """
    if by != "class" and not report.has_groups:
        raise ValueError(
            f"by={(called or by)!r} needs groups in the report, got none. Give the batch schema a `group`."
        )
    seen = tuple(report.class_support.shape if by == "class" else report.support.shape)
    if seen[-1] != shape[-1] or seen[0] > shape[0]:
        raise ValueError(
            f"`{where}` has shape {shape}, but the report counts {seen}. Build the loss for as many classes and groups "
            "as validation has."
        )
    size = shape[:1] if by == "group" else shape
    trained = None if report.train_counts is None or int(report.train_counts.sum()) == 0 else report.train_counts
    fed = _reduced(report.support if trained is None else trained, by).double()
    recall, support = {
        "class": (report.recall, report.class_support),
        "group": (report.group_accuracy, report.group_support),
        "cell": (report.cell_recall, report.support),
    }[by]
    epoch = torch.zeros_like(fed) if trained is None else fed / (report.epoch + 1)
    return Cells(
        _filled(recall, size, math.nan),
        tuple(map(int, _filled(support, size, 0))),
        _filled(fed / fed.sum().clamp(min=1), size, 0.0),
        _filled(epoch, size, 0.0),
        _loss(report, by, size),
        *_names(report, by),
    )


def changes(
    report: BiasReport,
    cells: Cells,
    quantity: str,
    old: Sequence[float],
    new: Sequence[float],
    notes: Sequence[str],
    *,
    answering: bool = True,
) -> tuple[Action, ...]:
    """Say which entries of a table changed noticeably; of many, the largest changes.

    Args:
        report: The report that was answered.
        cells: What it says of each cell.
        quantity: What the table holds: ``"weight"``, or ``"shift"``, where a lower one helps.
        old: Entries before.
        new: Entries after.
        notes: Why, for each cell.
        answering: Name the finding that a change answers: that of a cell which is helped by it.
    """
    moves = [_move(quantity, before, after) for before, after in zip(old, new, strict=True)][: len(cells.names)]
    told = sorted(
        (index for index, move in enumerate(moves) if abs(move) > _WORTH_SAYING), key=lambda i: -abs(moves[i])
    )
    found = {finding.key for finding in report.findings} if answering else set()
    actions = [
        Action(
            f"{cells.names[index]}: {quantity} {old[index]:.2f} -> {new[index]:.2f} ({notes[index]})",
            next((key for key in cells.keys[index] if moves[index] > 0 and key in found), None),
            old[index],
            new[index],
        )
        for index in told[:_MOST_ACTIONS]
    ]
    if len(told) > _MOST_ACTIONS:
        actions.append(Action(f"{len(told) - _MOST_ACTIONS} other {quantity}s changed less"))
    return tuple(actions)


def _move(quantity: str, old: float, new: float) -> float:
    """Return by how much a cell is helped, in log weight."""
    return math.log(new / old) if quantity == "weight" else old - new


def _loss(report: BiasReport, by: str, size: tuple[int, ...]) -> tuple[float, ...] | None:
    measured = report.calibration
    if measured is None:
        return None
    loss: Tensor = {"class": measured.class_loss, "group": measured.group_loss, "cell": measured.cell_loss}[by]
    return _filled(loss, size, math.nan)


def _reduced(counts: Tensor, by: str) -> Tensor:
    return {"class": counts.sum(dim=0), "group": counts.sum(dim=1), "cell": counts}[by]


def _filled(values: Tensor, shape: tuple[int, ...], fill: float) -> tuple[float, ...]:
    """Fill up the groups that validation has not shown yet, and lay all in one row."""
    filled = values.new_full(shape, fill)
    filled[: len(values)] = values
    return tuple(filled.flatten().tolist())


def _names(report: BiasReport, by: str) -> tuple[tuple[str, ...], tuple[tuple[Key, ...], ...]]:
    groups, classes = report.group_names, report.class_names
    if by == "class":
        return classes, tuple((("class", label),) for label in classes)
    if by == "group":
        inside = {group: tuple(("group", f"{group}, {label}") for label in classes) for group in groups}
        return groups, tuple((("group", group), *inside[group]) for group in groups)
    cells = [(group, label) for group in groups for label in classes]
    return tuple(f"{group}, {label}" for group, label in cells), tuple(
        (("group", f"{group}, {label}"), ("group", group), ("class", label)) for group, label in cells
    )
