"""A bias report in words: headline, findings, and the tables behind them, as Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from attn_callbacks.bias import _sections as sections
from attn_callbacks.bias._table import MAX_ROWS, cell_text, chance, number, table, with_interval

if TYPE_CHECKING:
    from attn_callbacks.bias.report import BiasReport

__all__ = ["summary_text"]


def summary_text(report: BiasReport) -> str:
    """Write a report as Markdown: headline, findings, then classes, groups, attention, reliance and candidates.

    Args:
        report: The report.
    """
    parts = [*_headline(report), *_findings(report), *sections.classes(report), *sections.priors(report)]
    if report.has_groups:
        parts += [*sections.groups(report), *sections.fairness(report), *sections.cells(report)]
    parts += [*sections.attention(report), *sections.divergence(report)]
    parts += [*sections.reliance(report), *sections.candidates(report)]
    return "\n".join(parts)


def _headline(report: BiasReport) -> Iterator[str]:
    names = {"worst_class_recall": "worst class recall", "macro_f1": "macro-F1"}
    if report.has_groups:
        names["worst_group_accuracy"] = "worst group accuracy"
        names["worst_cell_recall"] = "worst recall of a class in a group"
    names = {
        "accuracy": "accuracy",
        **names,
        "gap": "gap between groups" if report.has_groups else "gap between classes",
    }
    figures = (f"{text} {with_interval(getattr(report, name), report.interval(name))}" for name, text in names.items())
    yield f"**Bias at epoch {report.epoch}, step {report.step}**: {', '.join(figures)}"
    if report.calibration is not None:
        error = with_interval(report.calibration.ece, report.calibration.ece_interval)
        yield f"\nCalibration error (ECE) {error}, mean loss {number(report.calibration.mean_loss)}."


def _findings(report: BiasReport) -> Iterator[str]:
    found = report.findings[:MAX_ROWS]
    if not found:
        yield "\nNo finding: nothing exceeds the dead band and chance."
        return
    yield "\n**Findings**, the largest first:"
    yield from table(
        "finding",
        range(len(found)),
        [f"{finding.kind}: {finding.where}" for finding in found],
        {
            "size [95 % interval]": lambda i: with_interval(found[i].size, found[i].interval),
            "p, corrected": lambda i: chance(found[i].p_value),
            "samples": lambda i: str(found[i].support),
            "answered by": lambda i: ", ".join(found[i].answers) or "marking it",
        },
        ["answered by"],
    )
    yield ""
    for finding in found:
        yield f"- {' '.join(map(cell_text, (finding.text, *finding.evidence)))}"
    if len(report.findings) > MAX_ROWS:
        yield f"- and {len(report.findings) - MAX_ROWS} smaller ones."
