"""How weights follow from counts, recalls or losses: pure functions on plain numbers.

Plain numbers and exactly rounded sums (``math.fsum``) instead of tensors: the result depends neither on the device nor
on the order of the cells, to the last bit. Weights are natural logarithms; a cell is a class, a group, or a class
within a group. Where nothing is known of a cell its number is NaN, in what goes in and in what comes out: a weight that
is NaN is left as it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

__all__ = [
    "blend",
    "centre_rows",
    "difficulty_weights",
    "effective_number_weights",
    "group_dro_step",
    "inverse_frequency_weights",
    "preserve_prior",
    "share_weights",
]


def blend(old: Sequence[float], new: Sequence[float], smoothing: float) -> tuple[float, ...]:
    """Average exponentially; what was not measured now keeps its average, what was never averaged begins with it.

    Args:
        old: Averages; NaN where there is none yet.
        new: Measurements; NaN where there is none.
        smoothing: Share of the old average in the new one.

    Example:
        >>> blend([0.5, math.nan, 0.5], [1.0, 1.0, math.nan], 0.5)
        (0.75, 1.0, 0.5)
    """
    return tuple(
        before if math.isnan(now) else now if math.isnan(before) else smoothing * before + (1 - smoothing) * now
        for before, now in zip(old, new, strict=True)
    )


def preserve_prior(
    log_weight: Sequence[float], prior: Sequence[float], steered: Sequence[bool] | None = None
) -> tuple[float, ...]:
    r"""Divide the steered weights by one number, so that :math:`\sum_c \pi_c w_c` is what it is with weights of one.

    The expected loss so keeps its scale, and with it the effective learning rate.

    Args:
        log_weight: Logarithm of each weight.
        prior: Share of each cell in what training is fed.
        steered: Which weights are; ``None``: those that are not NaN. The others stay.

    Example:
        >>> [round(math.exp(value), 2) for value in preserve_prior([0.0, math.log(3)], [0.5, 0.5])]
        [0.5, 1.5]
    """
    steered = [not math.isnan(value) for value in log_weight] if steered is None else steered
    cells = [(math.exp(value), share) for value, share, use in zip(log_weight, prior, steered, strict=True) if use]
    fed = math.fsum(share for _, share in cells)
    if fed <= 0:  # training was fed nothing of them: their scale does not matter
        return tuple(log_weight)
    excess = math.log(math.fsum(share * weight for weight, share in cells) / fed)
    return tuple(value - excess if use else value for value, use in zip(log_weight, steered, strict=True))


def centre_rows(log_weight: Sequence[float], width: int, steered: Sequence[bool]) -> tuple[float, ...]:
    """Subtract from the steered weights of each row their mean: where only differences within a row act.

    Args:
        log_weight: Logarithm of each weight, row by row.
        width: Cells in a row.
        steered: Which weights are; the others stay.

    Example:
        >>> centre_rows([3.0, 1.0, 0.5, 9.0], 2, [True, True, True, False])
        (1.0, -1.0, 0.0, 9.0)
    """
    means = []
    for start in range(0, len(log_weight), width):
        row = slice(start, start + width)
        known = [value for value, use in zip(log_weight[row], steered[row], strict=True) if use]
        means.append(math.fsum(known) / max(len(known), 1))
    return tuple(
        value - means[index // width] if use else value
        for index, (value, use) in enumerate(zip(log_weight, steered, strict=True))
    )


def difficulty_weights(
    recall: Sequence[float], prior: Sequence[float], *, tau: float, limit: float
) -> tuple[float, ...]:
    r"""Weigh each class by its difficulty: :math:`w_c \propto (1 - \text{recall}_c)^\tau`.

    Args:
        recall: Recall of each cell, averaged or not; NaN where it was not measured.
        prior: Share of each cell in what training is fed.
        tau: Exponent, at least 0; 0 weighs all alike.
        limit: Weights stay between ``1 / limit`` and ``limit`` around their geometric mean, also that of a class that
            is always recognised.

    Returns:
        Log weights that preserve the prior; NaN without a recall.

    Example:
        >>> log_weight = difficulty_weights([0.9, 0.7], [0.5, 0.5], tau=1.0, limit=10.0)
        >>> [round(math.exp(value), 2) for value in log_weight]
        [0.5, 1.5]

    References:
        Sinha, Ohashi and Nakamura, "Class-Wise Difficulty-Balanced Loss for Solving Class-Imbalance", ACCV 2020.
    """
    missing = [1.0 if tau == 0 and not math.isnan(value) else 1 - value for value in recall]
    raw = [tau * math.log(value) if value > 0 else -math.inf if value <= 0 else math.nan for value in missing]
    return preserve_prior(_bounded(raw, limit), prior)


def effective_number_weights(
    counts: Sequence[float], prior: Sequence[float], *, beta: float, limit: float
) -> tuple[float, ...]:
    r"""Weigh each class by the inverse of its effective number of samples.

    .. math:: w_c \propto (1 - \beta) / (1 - \beta^{n_c})

    Args:
        counts: Training samples of each cell in an epoch; 0 where there are none, or none is known.
        prior: Share of each cell in what training is fed.
        beta: Between 0 (all alike) and 1 (inverse frequency).
        limit: Weights stay between ``1 / limit`` and ``limit`` around their geometric mean.

    Returns:
        Log weights that preserve the prior; NaN without samples.

    Example:
        >>> log_weight = effective_number_weights([90, 10, 0], [0.9, 0.1, 0.0], beta=1.0, limit=10.0)
        >>> [round(math.exp(value), 2) for value in log_weight]
        [0.56, 5.0, nan]

    References:
        Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019, Section 4.
    """
    raw = [_log_inverse_number(count, beta) if count > 0 else math.nan for count in counts]
    return preserve_prior(_bounded(raw, limit), prior)


def inverse_frequency_weights(counts: Sequence[float], prior: Sequence[float]) -> tuple[float, ...]:
    """Weigh each cell by the inverse of its number of samples, without any bound.

    Args:
        counts: Training samples of each cell.
        prior: Share of each cell in what training is fed.

    Returns:
        Log weights that preserve the prior; NaN without samples.
    """
    return effective_number_weights(counts, prior, beta=1.0, limit=math.inf)


def share_weights(share: Sequence[float], prior: Sequence[float], *, limit: float) -> tuple[float, ...]:
    r"""Weigh samples so that each group has a given share in the loss: :math:`w_g \propto q_g / \pi_g`.

    Args:
        share: Share of each group in the loss, above 0.
        prior: Share of each group in what training is fed.
        limit: Weights stay between ``1 / limit`` and ``limit`` around their geometric mean.

    Returns:
        Log weights that preserve the prior; NaN for groups that training is not fed.

    Example:
        >>> [round(math.exp(value), 2) for value in share_weights([0.5, 0.5], [0.8, 0.2], limit=10.0)]
        [0.62, 2.5]
    """
    raw = [math.log(wanted / fed) if fed > 0 else math.nan for wanted, fed in zip(share, prior, strict=True)]
    return preserve_prior(_bounded(raw, limit), prior)


def group_dro_step(
    share: Sequence[float], loss: Sequence[float], *, step_size: float, floor: float
) -> tuple[float, ...]:
    r"""Move the shares of the groups towards those with a high loss: :math:`q_g \leftarrow q_g e^{\eta \ell_g}`.

    Groups without a loss keep their share exactly; the others are normalised within the rest. (Counted as a loss of 0
    they would fade away for no other reason than having been absent.)

    Args:
        share: Share of each group, above 0.
        loss: Loss of each group; NaN where it was not measured.
        step_size: Change of the log share for each unit of loss.
        floor: No measured group falls below this part of an even share, in (0, 1).

    Returns:
        The new shares, in the same sum.

    Example:
        >>> [
        ...     round(value, 3)
        ...     for value in group_dro_step([0.4, 0.4, 0.2], [1.0, 0.0, math.nan], step_size=1.0, floor=0.1)
        ... ]
        [0.585, 0.215, 0.2]

    References:
        Sagawa et al., "Distributionally Robust Neural Networks for Group Shifts", ICLR 2020, Algorithm 1.
    """
    present = [index for index, value in enumerate(loss) if math.isfinite(value)]
    if len(present) < 2:
        return tuple(share)
    mass = math.fsum(share[index] for index in present)
    score = {index: math.log(share[index]) + step_size * loss[index] for index in present}
    largest = max(score.values())
    raw = {index: math.exp(value - largest) for index, value in score.items()}
    moved = _raised(raw, mass, floor * mass / len(present))
    return tuple(moved.get(index, value) for index, value in enumerate(share))


def _raised(raw: Mapping[int, float], mass: float, low: float) -> dict[int, float]:
    """Scale to a sum of ``mass`` with no value below ``low``, which has to be below the mean."""
    raised: set[int] = set()
    while True:
        scale = (mass - low * len(raised)) / math.fsum(value for index, value in raw.items() if index not in raised)
        below = {index for index, value in raw.items() if index not in raised and value * scale < low}
        if not below:
            return {index: low if index in raised else value * scale for index, value in raw.items()}
        raised |= below


def _log_inverse_number(count: float, beta: float) -> float:
    if beta == 1:
        return -math.log(count)
    return 0.0 if beta == 0 else math.log((1 - beta) / -math.expm1(count * math.log(beta)))


def _bounded(raw: Sequence[float], limit: float) -> list[float]:
    """Centre the logarithms on their mean and clip them; minus infinity becomes the lower bound."""
    finite = [value for value in raw if math.isfinite(value)]
    if not finite:  # nothing is known, or all are zero and so alike
        return [value if math.isnan(value) else 0.0 for value in raw]
    centre, bound = math.fsum(finite) / len(finite), math.log(limit)
    return [value if math.isnan(value) else min(max(value - centre, -bound), bound) for value in raw]
