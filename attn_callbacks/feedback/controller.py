"""How recalls, or F1 scores, become weights: one step of a smoothed, bounded controller.

Plain numbers and exactly rounded sums (``math.fsum``) instead of tensors: the result depends neither on the device nor
on the order of the cells, to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from attn_callbacks._checks import at_least, check_number, in_range
from attn_callbacks.feedback._deviations import agreed, averaged, deviations, standard_error
from attn_callbacks.feedback._f1 import F1Rates
from attn_callbacks.feedback.weight_policies import centre_rows, preserve_prior

__all__ = ["ControllerSettings", "ControllerState", "control_step", "f1_step"]


@dataclass(frozen=True)
class ControllerSettings:
    """How fast and how far weights move.

    Args:
        step_size: Change of the log weight for each unit of recall that is missing, above 0.
        smoothing: Share of the old average in the new one in the end, from 0 (the last recall alone) to below 1.
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
        average: Exponential average of each recall, or F1; NaN for a cell that was never measured. Such a cell has not
            been steered, and its weight is not touched.
        excess: The same of how much too often each class is predicted, for :func:`f1_step`; else empty.
        settled: How far each average has got over its start: ``1 - smoothing ** measurements``; empty: all have.
    """

    log_weight: tuple[float, ...]
    average: tuple[float, ...]
    excess: tuple[float, ...] = ()
    settled: tuple[float, ...] = ()

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
    width: int | None = None,
) -> ControllerState:
    r"""Average the new recalls and move the weights against their deviations.

    With the average :math:`m_c` of the first :math:`t` recalls of a cell, over the cells that have support,

    .. math::
        m_c \leftarrow m_c + \frac{1 - b}{1 - b^t} (\text{recall}_c - m_c), \qquad
        e_c = \operatorname{mean}_k m_k - m_c, \qquad
        \log w_c \leftarrow \operatorname{clamp}(\log w_c + \eta\, e_c, \pm\log r)

    where :math:`e_c = 0` unless it exceeds the dead band and the standard error of :math:`m_c` (one hit and one miss
    added), and is then no larger than the present deviation, that of the last recalls, and 0 where that has the other
    sign: what an average still remembers of a model that had collapsed winds no weight up. All weights ever steered are
    then divided by one number so that :math:`\sum_c \pi_c w_c` is what it would be with weights of 1: the expected loss
    keeps its scale, and with it the effective learning rate.

    Margins of classes within groups act through their differences within a group alone: a constant of a row changes
    nothing. With ``width``, each row of log weights is therefore centred on 0, before it is clamped and after, and not
    normalised. The deviations are still those from the mean of all cells, but compared with the present ones in
    their differences from the row.

    Args:
        state: State before the step.
        recall: Recall of each cell; NaN where it was not measured.
        support: Number of samples behind each recall.
        prior: Share of each cell in what training is fed.
        settings: How fast and how far.
        act: ``False`` averages only, as during a warm-up.
        width: Cells in a row within which alone differences act; ``None``: the weights of all cells act.

    Returns:
        The state after the step.

    Example:
        >>> state = ControllerState((0.0, 0.0), (math.nan, math.nan))
        >>> state = control_step(state, [0.5, 0.9], [100, 100], [0.5, 0.5], ControllerSettings())
        >>> [round(weight, 3) for weight in state.weight]
        [1.38, 0.62]
    """
    measured, now = _measured(recall, support, settings)
    average, settled = averaged(state.average, now, state.settled, settings.smoothing)
    if not act:
        return ControllerState(state.log_weight, average, settled=settled)
    uncertain = [standard_error(value, size) for value, size in zip(average, support, strict=True)]
    errors = deviations(average, measured, uncertain, settings.dead_band)
    errors = agreed(errors, deviations(now, measured), measured, width)
    return ControllerState(_moved(state.log_weight, errors, average, prior, settings, width), average, settled=settled)


def f1_step(
    state: ControllerState,
    rates: F1Rates,
    support: Sequence[int],
    prior: Sequence[float],
    settings: ControllerSettings,
    *,
    act: bool = True,
) -> ControllerState:
    r"""Average the F1 scores, and move the weights of the classes below their mean towards a better one.

    Equal recalls are not the best F1: what a rare class gains in recall it may lose in precision. So a class whose
    average F1 lies below the mean of classes by :math:`d_c` gets :math:`\eta\,d_c` more log weight while its recall is
    below its precision (it is predicted too rarely), and as much less while it is above. Both are averaged, but no
    class moves in another direction than the last report alone would move it, as in :func:`control_step`. Where
    :math:`d_c` is within the dead band or its standard error, or recall and precision are balanced to within the dead
    band, nothing moves. Bounds and normalisation are those of :func:`control_step`.

    Args:
        state: State before the step.
        rates: F1 of each class, and how much too often it is predicted.
        support: Number of samples of each class behind it.
        prior: Share of each class in what training is fed.
        settings: How fast and how far.
        act: ``False`` averages only, as during a warm-up.

    Returns:
        The state after the step.

    Example:
        >>> from attn_callbacks.feedback._f1 import f1_rates
        >>> state, confusion = ControllerState((0.0, 0.0), (math.nan, math.nan)), [[99, 1], [60, 40]]
        >>> state = f1_step(state, f1_rates(confusion, [0.9, 0.1]), [100, 100], [0.9, 0.1], ControllerSettings())
        >>> [round(weight, 2) for weight in state.weight]
        [0.95, 1.45]
    """
    measured, now = _measured(rates.f1, support, settings)
    average, settled = averaged(state.average, now, state.settled, settings.smoothing)
    over_now = [value if use else math.nan for value, use in zip(rates.excess, measured, strict=True)]
    excess, _ = averaged(state.excess or (math.nan,) * len(now), over_now, state.settled, settings.smoothing)
    if not act:
        return ControllerState(state.log_weight, average, excess, settled)
    missing = deviations(average, measured, rates.f1_error, settings.dead_band)
    errors = _towards_balance(missing, excess, settings.dead_band)
    anywhere = [math.inf if error > 0 else 0.0 for error in deviations(now, measured)]  # one F1 is too noisy a length
    errors = agreed(errors, _towards_balance(anywhere, over_now), measured)
    return ControllerState(_moved(state.log_weight, errors, average, prior, settings), average, excess, settled)


def _measured(
    values: Sequence[float], support: Sequence[int], settings: ControllerSettings
) -> tuple[list[bool], list[float]]:
    """Return which cells count, and their values; NaN for the others."""
    known = [size >= settings.min_support and math.isfinite(value) for value, size in zip(values, support, strict=True)]
    return known, [value if use else math.nan for value, use in zip(values, known, strict=True)]


def _towards_balance(missing: Sequence[float], excess: Sequence[float], dead_band: float = 0.0) -> list[float]:
    """Turn what is missing in F1 into the direction that balances recall and precision."""
    return [
        0.0 if error <= 0 or abs(over) <= dead_band else math.copysign(error, -over)
        for error, over in zip(missing, excess, strict=True)
    ]


def _moved(
    log_weight: Sequence[float],
    errors: Sequence[float],
    average: Sequence[float],
    prior: Sequence[float],
    settings: ControllerSettings,
    width: int | None = None,
) -> tuple[float, ...]:
    """Move the log weights of the cells that were ever measured, within bounds, and normalise them."""
    bound, steered = math.log(settings.limit), [not math.isnan(value) for value in average]
    new = [old + settings.step_size * error for old, error in zip(log_weight, errors, strict=True)]
    new = new if width is None else list(centre_rows(new, width, steered))
    new = [min(max(value, -bound), bound) if use else value for value, use in zip(new, steered, strict=True)]
    return preserve_prior(new, prior, steered) if width is None else centre_rows(new, width, steered)
