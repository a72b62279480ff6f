"""How strong a guiding term is: moved by what validation shows.

Guidance works in a window of strengths: too little does nothing, and three times what helps may ruin the fit. So the
strength moves in steps that cannot jump over the window, up by half and down to a half, one report at rest after each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from attn_callbacks._checks import at_least, check_number, in_range
from attn_callbacks.bias import BiasReport
from attn_callbacks.bias.rates import rate_error
from attn_callbacks.feedback._accuracy_level import AccuracyLevel, compared
from attn_callbacks.feedback._reliance import feature_findings

__all__ = [
    "Evidence",
    "StrengthSettings",
    "StrengthState",
    "evidence",
    "fallen",
    "ramp",
    "strength_step",
]


@dataclass(frozen=True)
class StrengthSettings:
    """How fast and how far strength moves.

    Args:
        raise_by: Factor on the strength while what guidance is to cure stays, at least 1.
        lower_by: Divisor of the strength when accuracy fell and nothing asks for more, at least 1.
        limit: Strength stays between ``1 / limit`` and ``limit`` times what was asked for, at least 1.
        tolerance: Fall of accuracy below its running mean that is accepted, as is any within two standard errors.
        warm_up: Number of steps over which the strength grows from nothing.

    Raises:
        ValueError: If a setting is out of its range.
        TypeError: If ``warm_up`` is not an integer, or another setting is not a number.
    """

    raise_by: float = 1.5
    lower_by: float = 2.0
    limit: float = 10.0
    tolerance: float = 0.02
    warm_up: int = 0

    def __post_init__(self) -> None:
        for name in ("raise_by", "lower_by", "limit"):
            value = getattr(self, name)
            check_number(name, value)
            if not 1 <= value < math.inf:
                raise ValueError(f"`{name}` must be at least 1 and finite, got {value}.")
        in_range("tolerance", self.tolerance, 0, 1)
        at_least("warm_up", self.warm_up, 0)


@dataclass(frozen=True)
class StrengthState:
    """What the controller remembers.

    Args:
        factor: What the strength asked for is multiplied with.
        levels: Level that accuracy usually has, by what was measured.
        resting: The strength was changed in answer to the last report.
    """

    factor: float = 1.0
    levels: Mapping[str, AccuracyLevel] = field(default_factory=dict)
    resting: bool = False

    def to_dict(self) -> dict[str, object]:
        """Return plain numbers, lists and dicts."""
        return {
            "factor": self.factor,
            "levels": {measure: list(level) for measure, level in self.levels.items()},
            "resting": self.resting,
        }

    def restored(self, state: Mapping[str, object]) -> StrengthState:
        """Return what :meth:`to_dict` returned as a state; entries that it lacks stay as they are."""
        factor, levels = state.get("factor", self.factor), state.get("levels", self.levels)
        if not isinstance(factor, float) or not isinstance(levels, Mapping):
            return self
        known = {str(measure): AccuracyLevel(*level) for measure, level in levels.items()}
        return StrengthState(factor, known, bool(state.get("resting", self.resting)))


class Evidence(NamedTuple):
    """What a report says about the strength.

    Args:
        accuracies: How well the model does, and its standard error, by what was measured; NaN where there was nothing.
        reason: Why more strength is wanted, as a clause; ``None``: it is not.
    """

    accuracies: Mapping[str, tuple[float, float]]
    reason: str | None


def evidence(report: BiasReport) -> Evidence:
    """Read from a report how well the model does, and whether it still relies on spurious tokens.

    Validation data often hold the shortcut themselves, and a model that gives it up *should* lose accuracy there. So
    where functional reliance was measured, both accuracies count, with the spurious tokens as they are and shuffled
    across samples: a shortcut that goes takes from the one only. What takes from both is a ruined fit, or, on balanced
    data, a shortcut that comes; then reliance is a finding. Else it is the mean recall of classes within groups, else
    plain accuracy.

    Reliance, where it was measured, also says alone whether more is wanted; else a finding of attention does.

    Args:
        report: What the last validation pass showed.

    Example:
        >>> report = BiasReport(0, 0, torch.tensor([[[90, 10], [10, 90]]]), ("negative", "positive"))
        >>> evidence(report)
        Evidence(accuracies={'accuracy': (0.9, 0.021)}, reason=None)
    """
    reliance = report.reliance.get("spurious")
    if reliance is not None and reliance.support > 0:
        found = feature_findings(report, ("spurious",))
        reason = found[0].text.rstrip(".") if found else None
        pair = {"accuracy without spurious tokens": reliance.after, "accuracy with spurious tokens": reliance.before}
        return Evidence({name: _rated(value, reliance.support) for name, value in pair.items()}, reason)
    leaning = next((finding for finding in report.findings if finding.kind == "attention"), None)
    return Evidence(_fit(report), None if leaning is None else leaning.text.rstrip("."))


def strength_step(
    state: StrengthState, seen: Evidence, settings: StrengthSettings, *, act: bool = True, acted: bool = True
) -> StrengthState:
    """Raise the strength while more is wanted, lower it if accuracy fell, and rest for a report after each change.

    While more is wanted accuracy counts for nothing: a shortcut that is being learned takes from it as well, and less
    strength would let it.

    Args:
        state: State before the step.
        seen: What the report says. Accuracy fell if all that was measured fell below its running mean.
        settings: How fast and how far.
        act: ``False`` only notes the accuracy, as before guidance has reached its strength.
        acted: ``False`` never lowers: guidance that took part in no step has ruined nothing.

    Example:
        >>> settings, state = StrengthSettings(), StrengthState()
        >>> reason = "accuracy falls by 0.30 when spurious tokens are shuffled"
        >>> state = strength_step(state, Evidence({"accuracy": (0.9, 0.01)}, reason), settings)
        >>> state.factor, state.resting
        (1.5, True)
        >>> state = strength_step(state, Evidence({"accuracy": (0.9, 0.01)}, reason), settings)  # rests
        >>> strength_step(state, Evidence({"accuracy": (0.7, 0.01)}, reason), settings).factor
        2.25
        >>> strength_step(state, Evidence({"accuracy": (0.7, 0.01)}, None), settings).factor
        0.75
    """
    levels, fell = dict(state.levels), bool(seen.accuracies)
    for name, (now, error) in seen.accuracies.items():
        level, below = compared(levels.get(name), now, error, settings.tolerance)
        fell = fell and below
        if level is not None:
            levels[name] = level
    if not act or state.resting:
        return StrengthState(state.factor, levels, resting=False)
    factor = state.factor
    if seen.reason is not None:
        factor = min(factor * settings.raise_by, settings.limit)
    elif fell and acted:
        factor = max(factor / settings.lower_by, 1 / settings.limit)
    return StrengthState(factor, levels, resting=factor != state.factor)


def fallen(state: StrengthState, seen: Evidence) -> str:
    """Say how far accuracy fell, as a clause.

    Args:
        state: State after the step.
        seen: What the report said.
    """
    name, (now, _) = next(iter(seen.accuracies.items()))
    return f"{name} {now:.2f}, before {state.levels[name].mean:.2f}"


def ramp(steps: int, warm_up: int) -> float:
    """Return the share of the strength that is in force after so many steps.

    Example:
        >>> ramp(0, 10), ramp(4, 10), ramp(99, 10), ramp(0, 0)
        (0.1, 0.5, 1.0, 1.0)
    """
    return min(1.0, (steps + 1) / max(warm_up, 1))


def _fit(report: BiasReport) -> dict[str, tuple[float, float]]:
    known = report.support >= report.min_support
    if not report.has_groups or not bool(known.any()):
        return {"accuracy": _rated(report.accuracy, int(report.support.sum()))}
    errors = rate_error(report.cell_recall, report.support)[known]
    mean = float(report.cell_recall[known].mean())
    return {"mean recall of classes within groups": (mean, float(errors.square().sum().sqrt()) / len(errors))}


def _rated(value: float, support: int) -> tuple[float, float]:
    """Return a rate and its standard error."""
    return value, float(rate_error(torch.tensor(value), torch.tensor(support)))
