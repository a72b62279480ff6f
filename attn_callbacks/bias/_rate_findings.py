"""Findings about classes, groups, and classes within groups: rates that lie below those of their peers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attn_callbacks.bias._judge import ANSWERS, amount, beyond_chance, called, share_of
from attn_callbacks.bias.finding import Finding
from attn_callbacks.bias.peers import shortfall_interval, shortfall_p
from attn_callbacks.bias.rates import rate_error, shortfall

if TYPE_CHECKING:
    from attn_callbacks.bias.report import BiasReport

__all__ = ["cell_findings", "class_findings", "group_findings"]

_CELLS = 3
"""Cells of a group that its finding tells."""


class _Compared:
    """Rates against their peers, as one family of comparisons.

    Args:
        rates: Rates, ``(peers, ...)``.
        support: Number of samples of each.
        minimum: Least support that can be compared.
        left_out: ``True`` for what is a peer of others but no comparison of its own.
    """

    def __init__(self, rates: Tensor, support: Tensor, minimum: int, left_out: Tensor | None = None) -> None:
        estimable = support >= minimum
        chance = shortfall_p(rates, support, estimable)
        if left_out is not None:
            chance = chance.where(~left_out, torch.nan)
        self.rates, self.support = rates, support
        self.size, self.error = shortfall(rates, rate_error(rates, support), estimable)
        self.interval = shortfall_interval(rates, support, estimable)
        self.p_value, self.found = beyond_chance(self.size, chance)

    def finding(self, index: tuple[int, ...], kind: str, where: str, text: str, evidence: tuple[str, ...]) -> Finding:
        """Put one of them into a finding; `{}` in its text is the rate, the support and the size."""
        low, high = self.interval[index].tolist()
        measured = f"{self.rates[index]:.2f} on {self.support[index]} samples, {amount(self.size[index], (low, high))}"
        return Finding(
            kind,
            where,
            float(self.size[index]),
            float(self.error[index]),
            int(self.support[index]),
            text.replace("{}", measured),
            (low, high),
            float(self.p_value[index]),
            ANSWERS[kind],
            evidence,
        )


def class_findings(report: BiasReport) -> Iterator[Finding]:
    """Yield classes that are recognised less often than the mean of the others.

    Args:
        report: The report.
    """
    compared = _Compared(report.recall, report.class_support, report.min_support)
    for index in compared.found:
        name = report.class_names[index[0]]
        text = f"{called('Class', name)}: recall {{}} below the mean of the other classes."
        yield compared.finding(index, "class", name, text, tuple(_about_class(report, index[0])))


def group_findings(report: BiasReport) -> Iterator[Finding]:
    """Yield groups that are predicted right less often than the mean of the others.

    Args:
        report: The report.
    """
    compared = _Compared(report.group_accuracy, report.group_support, report.min_support)
    for index in compared.found:
        name = report.group_names[index[0]]
        text = f"{called('Group', name)}: accuracy {{}} below the mean of the other groups."
        yield compared.finding(index, "group", name, text, tuple(_about_group(report, index[0])))


def cell_findings(report: BiasReport) -> Iterator[Finding]:
    """Yield classes that are recognised less often within a group than the same class is in other groups.

    Group accuracy hides them where a group consists mostly of one class. A group that holds a single class is left out:
    its cell is the group.

    Args:
        report: The report.
    """
    single = ((report.support > 0).sum(dim=1, keepdim=True) <= 1).expand_as(report.support)
    compared = _Compared(report.cell_recall, report.support, report.min_support, single)
    for index in compared.found:
        group, label = report.group_names[index[0]], report.class_names[index[1]]
        where = f"{called('Group', group)}, {called('class', label)}"
        text = f"{where}: recall {{}} below the same class in the other groups."
        yield compared.finding(index, "group", f"{group}, {label}", text, tuple(_about_cell(report, *index)))


def _about_class(report: BiasReport, label: int) -> Iterator[str]:
    seen, told = report.label_prior[label], report.prediction_prior[label]
    if told < seen:
        yield f"Predicted too seldom: {share_of(told)} of the predictions, {share_of(seen)} of the labels."
    trained = report.training_prior[label]
    if trained < 0.5 / len(report.class_names) or trained < 0.5 * seen:
        yield f"Rare in training: {share_of(trained)} of the samples."
    yield from _mistaken(report, report.counts.sum(dim=0)[label], label)


def _about_group(report: BiasReport, group: int) -> Iterator[str]:
    recall = report.cell_recall[group].where(report.support[group] >= report.min_support, torch.inf)
    cells = [
        f"{report.class_names[label]} {recall[label]:.2f} on {report.support[group, label]} samples"
        for label in recall.argsort(stable=True)[:_CELLS].tolist()
        if recall[label] < torch.inf
    ]
    if cells:
        yield f"Lowest recalls in it: {', '.join(cells)}."
    if report.train_counts is not None:
        fed = report.train_counts.sum(dim=1)
        yield f"Share of training: {share_of(fed[group] / fed.sum())}."


def _about_cell(report: BiasReport, group: int, label: int) -> Iterator[str]:
    if report.train_counts is not None:
        fed = report.train_counts[:, label]
        yield f"In training, {share_of(fed[group] / fed.sum())} of the class are of this group."
    yield from _mistaken(report, report.counts[group, label], label)


def _mistaken(report: BiasReport, predicted: Tensor, label: int) -> Iterator[str]:
    wrong = predicted.clone()
    wrong[label] = 0
    taken, errors = int(wrong.argmax()), int(wrong.sum())
    if len(wrong) > 2 and errors:
        yield f"Mostly taken for {report.class_names[taken]}: {wrong[taken]} of {errors} errors."
