r"""How strong a guiding term is: measured against the loss it is added to, and moved by what validation shows.

Guidance works in a window of strengths: too little does nothing, and about three times what helps ruins the fit. So the
strength moves in steps that cannot jump over the window, up by half and down to a half, one report at rest after each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, distributed

from attn_callbacks._checks import at_least, check_number, in_range
from attn_callbacks.bias import BiasReport
from attn_callbacks.bias.rates import rate_error

__all__ = ["Evidence", "StrengthSettings", "StrengthState", "averaged", "evidence", "ramp", "scale", "strength_step"]

DEAD_BAND = 0.02
ERRORS = 2.0
_MEMORY = 0.99  # share of the old averages in the new ones: about the last hundred steps
_LARGEST_SCALE = 100.0


@dataclass(frozen=True)
class StrengthSettings:
    """How fast and how far strength moves.

    Args:
        raise_by: Factor on the strength while what guidance is to cure stays, at least 1.
        lower_by: Divisor of the strength when accuracy fell, at least 1.
        limit: Strength stays between ``1 / limit`` and ``limit`` times what was asked for, at least 1.
        tolerance: Fall of accuracy below its best that is accepted, as is any within two standard errors.
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
        best: Best accuracy so far and its standard error, by what was measured.
        resting: The strength was changed in answer to the last report.
    """

    factor: float = 1.0
    best: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    resting: bool = False

    def to_dict(self) -> dict[str, object]:
        """Return plain numbers, lists and dicts."""
        return {
            "factor": self.factor,
            "best": {measure: list(best) for measure, best in self.best.items()},
            "resting": self.resting,
        }

    def restored(self, state: Mapping[str, object]) -> StrengthState:
        """Return what :meth:`to_dict` returned as a state; entries that it lacks stay as they are."""
        factor, best = state.get("factor", self.factor), state.get("best", self.best)
        if not isinstance(factor, float) or not isinstance(best, Mapping):
            return self
        known = {str(measure): (float(value), float(error)) for measure, (value, error) in best.items()}
        return StrengthState(factor, known, bool(state.get("resting", self.resting)))


class Evidence(NamedTuple):
    """What a report says about the strength.

    Args:
        measure: What ``accuracy`` is.
        accuracy: How well the model does; NaN where it was not measured.
        error: Its standard error.
        reason: Why more strength is wanted, as a clause; ``None``: it is not.
    """

    measure: str
    accuracy: float
    error: float
    reason: str | None


def evidence(report: BiasReport) -> Evidence:
    """Read from a report how well the model does, and whether it still relies on spurious tokens.

    Validation data often hold the shortcut themselves, and a model that gives it up *should* lose accuracy there. So
    the first of these that was measured counts: accuracy with the spurious tokens shuffled across samples; the mean
    recall of classes within groups; plain accuracy.

    Where functional reliance was measured, it alone says whether more is wanted; else a finding of attention does.

    Args:
        report: What the last validation pass showed.

    Example:
        >>> report = BiasReport(0, 0, torch.tensor([[[90, 10], [10, 90]]]), ("negative", "positive"))
        >>> evidence(report)
        Evidence(measure='accuracy', accuracy=0.9, error=0.0212..., reason=None)
    """
    reliance = report.reliance.get("spurious")
    if reliance is not None and reliance.support > 0:
        stays = reliance.drop > max(DEAD_BAND, ERRORS * reliance.error)
        reason = f"accuracy falls by {reliance.drop:.2f} when spurious tokens are shuffled" if stays else None
        error = float(rate_error(torch.tensor(reliance.after), torch.tensor(reliance.support)))
        return Evidence("accuracy without spurious tokens", reliance.after, error, reason)
    leaning = next((finding for finding in report.findings if finding.kind == "attention"), None)
    reason = None if leaning is None else leaning.text.rstrip(".")
    return Evidence(*_fit(report), reason)


def strength_step(
    state: StrengthState, seen: Evidence, settings: StrengthSettings, *, act: bool = True
) -> StrengthState:
    """Lower the strength if accuracy fell, raise it while more is wanted, and rest for a report after each change.

    Args:
        state: State before the step.
        seen: What the report says.
        settings: How fast and how far.
        act: ``False`` only notes the accuracy, as before guidance has reached its strength.

    Example:
        >>> settings, state = StrengthSettings(), StrengthState()
        >>> reliant = Evidence("accuracy", 0.9, 0.01, "accuracy falls by 0.30 when spurious tokens are shuffled")
        >>> state = strength_step(state, reliant, settings)
        >>> state.factor, state.resting
        (1.5, True)
        >>> state = strength_step(state, reliant, settings)  # rests
        >>> strength_step(state, reliant._replace(accuracy=0.7), settings).factor
        0.75
    """
    best = state.best.get(seen.measure)
    if not math.isnan(seen.accuracy) and (best is None or seen.accuracy > best[0]):
        state = replace(state, best={**state.best, seen.measure: (seen.accuracy, seen.error)})
    if not act or state.resting:
        return replace(state, resting=False)
    factor = state.factor
    if best is not None and _fell(best, seen, settings.tolerance):
        factor = max(factor / settings.lower_by, 1 / settings.limit)
    elif seen.reason is not None:
        factor = min(factor * settings.raise_by, settings.limit)
    return replace(state, factor=factor, resting=factor != state.factor)


def ramp(steps: int, warm_up: int) -> float:
    """Return the share of the strength that is in force after so many steps.

    Example:
        >>> ramp(0, 10), ramp(4, 10), ramp(99, 10), ramp(0, 0)
        (0.1, 0.5, 1.0, 1.0)
    """
    return min(1.0, (steps + 1) / max(warm_up, 1))


@torch.no_grad()
def averaged(averages: Tensor | None, base: Tensor, term: Tensor, annotated: Tensor) -> Tensor:
    """Take a step's losses into running averages, over all processes; every process has to call it at every step.

    Losses that are not finite leave the averages alone, and so does the term of a step without annotation.

    Args:
        averages: What it returned before; ``None`` at the first step.
        base: Loss without the term.
        term: The term, with the factor 1.
        annotated: ``True`` if the step had annotated samples.

    Shape:
        - averages, output: ``(2,)``: of the loss and of the term; NaN before the first
        - base, term, annotated: scalar
    """
    values = torch.stack([base.detach().float(), term.detach().float()])
    known = values.isfinite() & torch.stack([torch.ones_like(annotated), annotated])
    sums = torch.stack([values.where(known, 0.0), known.float()])
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(sums)
    mean = sums[0] / sums[1]
    old = mean if averages is None else averages.to(mean.device)
    moved = torch.where(old.isnan(), mean, _MEMORY * old + (1 - _MEMORY) * mean)
    return moved.where(sums[1] > 0, old)


def scale(averages: Tensor) -> Tensor:
    """Return the factor that gives the term the size of the loss, between 1/100 and 100; a scalar.

    Args:
        averages: What :func:`averaged` returned.
    """
    base, term = averages.unbind()
    ratio = base / term.clamp(min=torch.finfo(term.dtype).tiny)
    return ratio.nan_to_num(1.0).clamp(1 / _LARGEST_SCALE, _LARGEST_SCALE)


def _fell(best: tuple[float, float], seen: Evidence, tolerance: float) -> bool:
    fall = best[0] - seen.accuracy
    return fall > tolerance and fall > ERRORS * math.hypot(best[1], seen.error)


def _fit(report: BiasReport) -> tuple[str, float, float]:
    """Return what is measured, the value, and its standard error."""
    known = report.support >= report.min_support
    if report.has_groups and bool(known.any()):
        errors = rate_error(report.cell_recall, report.support)[known]
        mean = float(report.cell_recall[known].mean())
        return "mean recall of classes within groups", mean, float(errors.square().sum().sqrt()) / len(errors)
    total = report.support.sum()
    return "accuracy", report.accuracy, float(rate_error(torch.tensor(report.accuracy), total))
