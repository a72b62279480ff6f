"""Findings about features: token sets that predictions rely on, and candidates where no set was marked."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import NormalDist
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attn_callbacks.bias._judge import ANSWERS, amount, beyond_chance
from attn_callbacks.bias.candidate import Candidate
from attn_callbacks.bias.corrections import holm
from attn_callbacks.bias.finding import Finding
from attn_callbacks.bias.intervals import deviations
from attn_callbacks.bias.reliance import Reliance

if TYPE_CHECKING:
    from attn_callbacks.bias.report import BiasReport

__all__ = ["candidate_chance", "candidate_findings", "is_marked", "reliance_findings", "without_set"]

_MARK = (
    "If it should not decide, mark it as spurious in the batch schema: reliance on it is then measured, and feedback "
    "can act."
)
_QUANTITY = {
    "attention": "attention, 0.5 being chance, of {wrong} in wrong predictions and {right} in right ones",
    "presence": "it is in a share of {wrong} of wrong predictions and {right} of right ones",
}
_CLASSES = 3
"""Classes that a finding tells."""


def reliance_findings(report: BiasReport) -> Iterator[Finding]:
    """Yield token sets without which outcomes change; relevant tokens are there to be relied on.

    Either accuracy falls beyond chance, or surely more than one outcome in ten changes, which is what is held to be
    worth acting on: where validation is balanced over a shortcut, as many get right without it as get wrong.

    Args:
        report: The report.
    """
    sets = [(name, reliance) for name, reliance in report.reliance.items() if name != "relevance"]
    if not sets:
        return
    enough = torch.tensor([reliance.support >= report.min_support for _, reliance in sets])
    size = torch.tensor([reliance.changed for _, reliance in sets], dtype=torch.float64).where(enough, torch.nan)
    either = [min(1.0, 2 * min(_drop_chance(reliance), reliance.changed_p_value)) for _, reliance in sets]
    chance = torch.tensor(either, dtype=torch.float64).where(enough, torch.nan)
    p_values, found = beyond_chance(size, chance)
    for (place,) in found:
        name, reliance = sets[place]
        text = f"Predictions rely on {name} tokens: without what they hold ({reliance.method}) {without_set(reliance)}."
        yield Finding(
            "feature",
            name,
            reliance.changed,
            reliance.changed_error,
            reliance.support,
            text,
            reliance.changed_interval,
            float(p_values[place]),
            ANSWERS["feature"],
            tuple(_about_set(report, name, reliance)),
        )


def without_set(reliance: Reliance) -> str:
    """Say what happens without a set, in the same figures wherever it is told."""
    return (
        f"the outcome of {amount(reliance.changed, reliance.changed_interval)} of {reliance.support} samples changes, "
        f"and accuracy goes from {reliance.before:.2f} to {reliance.after:.2f}"
    )


def _drop_chance(reliance: Reliance) -> float:
    """Probability of such a fall of accuracy by chance; a rise is no reliance."""
    return reliance.p_value if reliance.drop > 0 else 1.0


def candidate_findings(report: BiasReport) -> Iterator[Finding]:
    """Yield candidates that go with errors beyond chance, unless groups or a spurious set say more.

    Args:
        report: The report.
    """
    if report.has_groups or is_marked(report):
        return
    size = torch.tensor([candidate.difference for candidate in report.candidates], dtype=torch.float64)
    p_values, found = beyond_chance(size, _raw_chance(report), _comparisons(report))
    for (place,) in found:
        candidate = report.candidates[place]
        error = _error(candidate)
        reach = deviations() * error
        low, high = candidate.difference - reach, min(1.0, candidate.difference + reach)
        seen = _QUANTITY[candidate.kind].format(wrong=f"{candidate.wrong:.2f}", right=f"{candidate.right:.2f}")
        text = (
            f"Candidate {candidate.name} goes with errors: {seen}, a difference of "
            f"{amount(candidate.difference, (low, high))}, on {candidate.support} samples. {_MARK}"
        )
        where, chance = candidate.where, float(p_values[place])
        size_found, evidence = candidate.difference, tuple(f"Example: {example}" for example in candidate.examples)
        yield Finding("feature", where, size_found, error, candidate.support, text, (low, high), chance, (), evidence)


def is_marked(report: BiasReport) -> bool:
    """Tell whether somebody marked what is spurious, so that nobody has to guess."""
    return "spurious" in report.attention or "spurious" in report.reliance


def candidate_chance(report: BiasReport) -> Tensor:
    """Return the p-value of each candidate, corrected for all that were compared; NaN below the minimum support.

    Args:
        report: The report.
    """
    return holm(_raw_chance(report), _comparisons(report))


def _raw_chance(report: BiasReport) -> Tensor:
    chance = [c.p_value if c.support >= report.min_support else torch.nan for c in report.candidates]
    return torch.tensor(chance, dtype=torch.float64)


def _comparisons(report: BiasReport) -> int:
    return max((candidate.compared for candidate in report.candidates), default=0)


def _error(candidate: Candidate) -> float:
    """Standard error of the difference; where it was not given, that which fits the p-value."""
    if candidate.error > 0:
        return candidate.error
    chance = min(max(candidate.p_value, 1e-300), 1.0) / 2
    return candidate.difference / -NormalDist().inv_cdf(chance) if chance < 0.5 else torch.inf


def _about_set(report: BiasReport, name: str, reliance: Reliance) -> Iterator[str]:
    drop = reliance.class_drop.where(reliance.class_support >= report.min_support, -torch.inf)
    hit = [
        f"{report.class_names[label]} by {drop[label]:.2f}"
        for label in drop.argsort(descending=True, stable=True)[:_CLASSES].tolist()
        if drop[label] > 0
    ]
    if hit:
        yield f"Recall falls most for {', '.join(hit)}."
    share = report.attention.get(name)
    if share is not None and bool((share.support >= report.min_support).any()):
        label = int(share.mass.where(share.support >= report.min_support, -torch.inf).argmax())
        yield (
            f"Attention on them is highest for {report.class_names[label]}: mass {share.mass[label]:.2f}, "
            f"{share.lift[label]:.1f} times chance."
        )
