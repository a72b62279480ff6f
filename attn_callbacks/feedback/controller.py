"""How recalls become weights: one step of a smoothed, bounded controller.

Plain numbers and exactly rounded sums (``math.fsum``) instead of tensors: the result depends neither on the device nor
on the order of the cells, to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from attn_callbacks._checks import at_least, check_number, in_range
from attn_callbacks.feedback.weight_policies import blend, preserve_prior

__all__ = ["ControllerSettings", "ControllerState", "control_step"]


@dataclass(frozen=True)
class ControllerSettings:
    """How fast and how far weights move.

    Args:
        step_size: Change of the log weight for each unit of recall that is missing, above 0.
        smoothing: Share of the old average in the new one, from 0 (the last recall alone) to below 1.
        limit: Weights stay between ``1 / limit`` and ``limit`` before they are normalised, so no two of them differ by
            more than a factor of ``limit ** 2``; above 1.
        min_support: Least number of samples behind a recall that counts, at least 1.
        dead_band: Deviations of recall from the mean up to this, or up to their standard error, are left alone.

    Raises:
        ValueError: If a setting is out of its range.
        TypeError: If ``min_support`` is not an integer, or another setting is not a number.
    """

    step_size: float = 2.0
    smoothing: float = 0.7
    limit: float = 10.0
    min_support: int = 20
    dead_band: float = 0.02

    def __post_init__(self) -> None:
        for name in ("step_size", "smoothing", "limit", "dead_band"):
            check_number(name, getattr(self, name))
        if not 0 < self.step_size < math.inf:
            raise ValueError(f"`step_size` must be above 0 and finite, got {self.step_size}.")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"`smoothing` must lie in [0, 1), got {self.smoothing}: at 1 nothing new would count.")
        if not 1 < self.limit < math.inf:
            raise ValueError(f"`limit` must be above 1 and finite, got {self.limit}.")
        at_least("min_support", self.min_support, 1)
        in_range("dead_band", self.dead_band, 0, 1)


@dataclass(frozen=True)
class ControllerState:
    """What the controller remembers of each cell: a class, or a class within a group.

    Args:
        log_weight: Natural logarithm of each weight.
        average: Exponential average of each recall; NaN for a cell that was never measured. Such a cell has not been
            steered, and its weight is not touched.
    """

    log_weight: tuple[float, ...]
    average: tuple[float, ...]

    @property
    def weight(self) -> tuple[float, ...]:
        """The weights themselves."""
        return tuple(math.exp(value) for value in self.log_weight)


def control_step(
    state: ControllerState,
    recall: Sequence[float],
    support: Sequence[int],
    prior: Sequence[float],
    settings: ControllerSettings,
    *,
    act: bool = True,
) -> ControllerState:
    r"""Average the new recalls and move the weights against their deviations.

    With the average :math:`m_c`, over the cells that have support,

    .. math::
        m_c \leftarrow b\,m_c + (1 - b)\,\text{recall}_c, \qquad
        e_c = (1 - m_c) - \operatorname{mean}_k (1 - m_k), \qquad
        \log w_c \leftarrow \operatorname{clamp}(\log w_c + \eta\, e_c, \pm\log r)

    where :math:`e_c = 0` unless it exceeds the dead band and the standard error of :math:`m_c` (one hit and one miss
    added). All weights ever steered are then divided by one number so that :math:`\sum_c \pi_c w_c` is what it would be
    with weights of 1: the expected loss keeps its scale, and with it the effective learning rate.

    Args:
        state: State before the step.
        recall: Recall of each cell; NaN where it was not measured.
        support: Number of samples behind each recall.
        prior: Share of each cell in what training is fed.
        settings: How fast and how far.
        act: ``False`` averages only, as during a warm-up.

    Returns:
        The state after the step.

    Example:
        >>> state = ControllerState((0.0, 0.0), (math.nan, math.nan))
        >>> state = control_step(state, [0.5, 0.9], [100, 100], [0.5, 0.5], ControllerSettings())
        >>> [round(weight, 3) for weight in state.weight]
        [1.38, 0.62]
    """
    measured = [
        size >= settings.min_support and math.isfinite(value) for value, size in zip(recall, support, strict=True)
    ]
    counted = [value if known else math.nan for value, known in zip(recall, measured, strict=True)]
    average = blend(state.average, counted, settings.smoothing)
    if not act:
        return ControllerState(state.log_weight, average)
    errors = _errors(average, support, measured, settings.dead_band)
    bound = math.log(settings.limit)
    steered = [not math.isnan(value) for value in average]
    log_weight = [
        min(max(old + settings.step_size * error, -bound), bound) if moved else old
        for old, error, moved in zip(state.log_weight, errors, steered, strict=True)
    ]
    return ControllerState(preserve_prior(log_weight, prior, steered), average)


def _errors(
    average: Sequence[float], support: Sequence[int], measured: Sequence[bool], dead_band: float
) -> list[float]:
    """Return how far each measured cell lies below the mean of all; 0 within the dead band."""
    known = [value for value, use in zip(average, measured, strict=True) if use]
    if not known:
        return [0.0] * len(average)
    mean = math.fsum(known) / len(known)
    errors = []
    for value, size, use in zip(average, support, measured, strict=True):
        error = mean - value if use else 0.0
        errors.append(error if abs(error) > dead_band and abs(error) > _standard_error(value, size) else 0.0)
    return errors


def _standard_error(value: float, size: int) -> float:
    if math.isnan(value):
        return 0.0
    smoothed = (value * size + 1) / (size + 2)
    return math.sqrt(smoothed * (1 - smoothed) / (size + 2))
