"""From a report to its findings: which bias, where, how large, how sure, and what answers it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attn_callbacks.bias._attention_findings import attention_findings
from attn_callbacks.bias._feature_findings import candidate_findings, reliance_findings
from attn_callbacks.bias._judge import ANSWERS
from attn_callbacks.bias._rate_findings import cell_findings, class_findings, group_findings
from attn_callbacks.bias.finding import Finding

if TYPE_CHECKING:
    from attn_callbacks.bias.report import BiasReport

__all__ = ["ANSWERS", "diagnose"]


def diagnose(report: BiasReport) -> tuple[Finding, ...]:
    """Return what is beyond the dead band and beyond chance in a report, the largest first.

    There are six families of comparisons: classes, groups, classes within groups, attention on the judged token sets
    by class, functional reliance on token sets, and candidates. In each, p-values are corrected after Holm, and only
    what has minimum support is compared. Classes, groups and cells are tested against the mean of their peers to the
    one side that would be a bias, everything else to both sides.

    Attention mass never makes a finding of kind ``"feature"``: only outcomes that change without the set do, because
    accuracy falls beyond chance or because surely more than one in ten changes (a threshold of what is worth acting
    on); or, where neither groups nor spurious tokens are known, a candidate to be looked at.

    Args:
        report: The report.

    Example:
        >>> import torch
        >>> from attn_callbacks.bias import BiasReport
        >>> report = BiasReport(0, 0, torch.tensor([[[90, 10], [40, 60]]]), ("negative", "positive"))
        >>> (finding,) = diagnose(report)
        >>> finding.kind, finding.where, finding.answers
        ('class', 'positive', ('ClassReweighting', 'Resampling'))
    """
    found = [*class_findings(report)]
    if report.has_groups:
        found += [*group_findings(report), *cell_findings(report)]
    found += [*attention_findings(report), *reliance_findings(report), *candidate_findings(report)]
    return tuple(sorted(found, key=lambda finding: -finding.size))
