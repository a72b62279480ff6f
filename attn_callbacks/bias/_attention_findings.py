"""Findings about attention: too much of it on spurious tokens, too little on relevant ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attn_callbacks.bias._feature_findings import reliance_findings, without_set
from attn_callbacks.bias._judge import ANSWERS, amount, beyond_chance, called
from attn_callbacks.bias.corrections import normal_p
from attn_callbacks.bias.finding import Finding
from attn_callbacks.bias.intervals import deviations, normal_interval
from attn_callbacks.bias.share import AttentionShare

if TYPE_CHECKING:
    from attn_callbacks.bias.report import BiasReport

__all__ = ["attention_findings"]

_JUDGED = {"spurious": (1.0, "above"), "relevance": (-1.0, "below")}
"""Sets of which it is known where attention should be: the direction of a bias, and its word."""


def attention_findings(report: BiasReport) -> Iterator[Finding]:
    """Yield classes whose attention is above chance on spurious tokens, or below chance on relevant ones.

    Args:
        report: The report; token sets other than ``"spurious"`` and ``"relevance"`` are not judged.
    """
    shares = [(name, share) for name, share in report.attention.items() if name in _JUDGED]
    if not shares:
        return
    size = torch.stack([_size(name, share, report.min_support) for name, share in shares])  # (sets, classes)
    error = torch.stack([share.mass_error for _, share in shares])
    interval = normal_interval(size, error)
    p_values, found = beyond_chance(size, normal_p(size / error))
    for place, label in found:
        (name, share), at = shares[place], (place, label)
        low, high = interval[at].tolist()
        text = (
            f"{called('Class', report.class_names[label])}: {share.mass[label]:.2f} of the attention falls on {name} "
            "tokens, "
            f"{amount(size[at], (low, high))} {_JUDGED[name][1]} chance, on {share.support[label]} samples. "
            f"{_reliance(report, name)}"
        )
        yield Finding(
            "attention",
            f"{name}, {report.class_names[label]}",
            float(size[at]),
            float(error[at]),
            int(share.support[label]),
            text,
            (low, high),
            float(p_values[at]),
            ANSWERS["attention"],
            tuple(_outcomes(share, label, report.min_support)),
        )


def _size(name: str, share: AttentionShare, minimum: int) -> Tensor:
    off_chance = _JUDGED[name][0] * (share.mass - share.chance)
    return off_chance.where(share.support >= minimum, torch.nan)


def _reliance(report: BiasReport, name: str) -> str:
    """Say whether predictions depend on the set: attention mass alone does not tell."""
    reliance = report.reliance.get(name)
    if reliance is None or reliance.support < report.min_support:
        return "Whether predictions rely on them was not measured: mass is not reliance."
    changed = f"without what they hold, {without_set(reliance)}."
    if any(finding.where == name for finding in reliance_findings(report)):
        return f"Predictions do rely on them: {changed}"
    return f"Predictions were not seen to rely on them: {changed}"


def _outcomes(share: AttentionShare, label: int, minimum: int) -> Iterator[str]:
    if share.outcome_mass is None or share.outcome_support is None or share.outcome_error is None:
        return
    if int(share.outcome_support[label].min()) < minimum:
        return
    wrong, right = share.outcome_mass[label].tolist()
    reach = deviations() * float(share.outcome_error[label].square().sum().sqrt())
    difference = amount(wrong - right, (wrong - right - reach, wrong - right + reach))
    yield f"Mass in wrong predictions {wrong:.2f}, in right ones {right:.2f}: a difference of {difference}."
