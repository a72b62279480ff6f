"""What a report says of the reliance on one token or feature set."""

from __future__ import annotations

import math
from collections.abc import Collection

from attn_callbacks.bias import BiasReport, Finding

__all__ = ["KIND", "changed_without", "feature_findings", "is_candidate"]

KIND = "feature"


def feature_findings(report: BiasReport, names: Collection[str]) -> tuple[Finding, ...]:
    """Return the findings of reliance on any of the sets ``names``, the largest first."""
    return tuple(
        found
        for found in report.findings
        if found.kind == KIND and found.where in names and not is_candidate(report, found)
    )


def is_candidate(report: BiasReport, finding: Finding) -> bool:
    """Tell a feature that goes with errors, for somebody to look at, from one that predictions are known to rely on."""
    return finding.kind == KIND and finding.where not in report.reliance


def changed_without(report: BiasReport, name: str) -> float | None:
    """Return the share of outcomes that change without a set: 0 within chance, ``None`` where nobody measured.

    What is within chance is the diagnosis' to say: it knows how many sets were compared.
    """
    found = feature_findings(report, (name,))
    if found:
        return found[0].size
    measured = report.reliance.get(name)
    return None if measured is None or math.isnan(measured.drop) else 0.0
