"""A bias report in words: Markdown tables that also line up in a terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from attn_callbacks.bias.report import BiasReport

__all__ = ["summary_text"]

MAX_ROWS = 40
"""Rows of one table; of more, those with the lowest rates are shown."""


def summary_text(report: BiasReport) -> str:
    """Write a report as Markdown: headline, classes, groups, groups by class, findings.

    Args:
        report: The report.
    """
    parts = [_headline(report), *_table("class", _order(report.recall), report.class_names, _class_columns(report))]
    if report.has_groups:
        columns = _group_columns(report)
        parts += _table("group", _order(report.group_accuracy), report.group_names, columns)
        parts += _table(
            "group, class", _order(report.cell_recall.flatten()), _cell_names(report), _cell_columns(report)
        )
    return "\n".join([*parts, "", *_findings(report)])


Columns = dict[str, Callable[[int], str]]


def _headline(report: BiasReport) -> str:
    rates = {"accuracy": report.accuracy, "worst class recall": report.worst_class_recall}
    if report.has_groups:
        rates["worst group accuracy"] = report.worst_group_accuracy
        rates["worst recall of a class in a group"] = report.worst_cell_recall
    rates["gap"] = report.gap
    numbers = ", ".join(f"{name} {_number(value)}" for name, value in rates.items())
    return f"**Bias at epoch {report.epoch}, step {report.step}**: {numbers}"


def _class_columns(report: BiasReport) -> Columns:
    columns: Columns = {
        "support": lambda i: str(int(report.class_support[i])),
        "recall": lambda i: _with_error(report.recall[i], report.recall_error[i]),
        "precision": lambda i: _number(report.precision[i]),
        "F1": lambda i: _number(report.f1[i]),
        "label prior": lambda i: _number(report.label_prior[i]),
        "prediction prior": lambda i: _number(report.prediction_prior[i]),
    }
    trained = report.train_counts
    if trained is not None:
        prior = trained.sum(dim=0) / trained.sum()
        columns["training prior"] = lambda i: _number(prior[i])
    for name, share in report.attention.items():
        columns[f"{name} mass"] = lambda i, share=share: _number(share.mass[i])  # type: ignore[misc]
        columns[f"{name} lift"] = lambda i, share=share: _number(share.lift[i])  # type: ignore[misc]
    return columns


def _group_columns(report: BiasReport) -> Columns:
    return {
        "support": lambda i: str(int(report.group_support[i])),
        "accuracy": lambda i: _with_error(report.group_accuracy[i], report.group_accuracy_error[i]),
    }


def _cell_names(report: BiasReport) -> list[str]:
    return [f"{group}, {label}" for group in report.group_names for label in report.class_names]


def _cell_columns(report: BiasReport) -> Columns:
    support, recall, trained = report.support.flatten(), report.cell_recall.flatten(), report.train_counts
    columns: Columns = {"support": lambda i: str(int(support[i])), "recall": lambda i: _number(recall[i])}
    if trained is not None:
        prior = trained.flatten() / trained.sum()
        columns["training prior"] = lambda i: _number(prior[i])
    return columns


def _findings(report: BiasReport) -> Iterator[str]:
    if not report.findings:
        yield "No finding: no shortfall exceeds the dead band and two standard errors."
        return
    yield "Findings:\n"
    for finding in report.findings[:MAX_ROWS]:
        yield f"- {_cell_text(finding.text)}"
    if len(report.findings) > MAX_ROWS:
        yield f"- and {len(report.findings) - MAX_ROWS} smaller ones."


def _order(rates: Tensor) -> list[int]:
    """Return the rows to show, in their own order; the lowest rates where not all fit."""
    indices = range(len(rates))
    if len(rates) <= MAX_ROWS:
        return list(indices)
    values: list[float] = rates.nan_to_num(math.inf).tolist()
    return sorted(sorted(indices, key=lambda index: values[index])[:MAX_ROWS])


def _table(title: str, rows: Sequence[int], names: Sequence[str], columns: Columns) -> Iterator[str]:
    body = [[_cell_text(names[row]), *(column(row) for column in columns.values())] for row in rows]
    lines = [[title, *columns], *body]
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    yield ""
    for number, line in enumerate(lines):
        cells = [
            text.ljust(width) if place == 0 else text.rjust(width)
            for place, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        yield f"| {' | '.join(cells)} |"
        if number == 0:
            yield f"|{'-' * (widths[0] + 2)}|{'|'.join('-' * (width + 1) + ':' for width in widths[1:])}|"
    if len(names) > len(rows):
        yield f"\nThe {len(rows)} lowest of {len(names)} are shown."


def _cell_text(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _number(value: Tensor | float) -> str:
    number = float(value)
    return "n/a" if math.isnan(number) else f"{number:.3f}"


def _with_error(value: Tensor, error: Tensor) -> str:
    return _number(value) if math.isnan(float(value)) else f"{_number(value)} ± {float(error):.3f}"
