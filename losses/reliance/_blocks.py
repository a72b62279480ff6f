"""Groups of features as blocks of a matrix of weights: sums, sizes, and the proximal map of their norms."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["block_factor", "block_norm", "shrink_blocks", "spread_out"]

_NEWTON_STEPS = 5  # measured: enough for float32 over five orders of magnitude of thresholds within a block
_FLOOR = 1e-10


def block_norm(values: Tensor, groups: Tensor | None) -> Tensor:
    """Return the norm of each block, differentiable everywhere: at a block of zeros the gradient is zero.

    Args:
        values: Weights of each feature.
        groups: Label of each feature's block; ``None`` makes every feature a block.

    Shape:
        - values: ``(features, entries)``
        - groups: ``(features,)``
        - output: ``(features,)``, one value for each label; labels that do not occur have zero
    """
    total = _sums(values.square(), groups)
    return torch.where(total > 0, total, 1.0).sqrt() * (total > 0)


def block_factor(values: Tensor, feature_strength: Tensor | None, groups: Tensor | None) -> Tensor:
    """Return each block's mean strength times the root of its number of weights, ``(features,)``."""
    ones = values.new_ones(len(values), 1)
    features = _sums(ones, groups).clamp_min(1)
    strength = ones if feature_strength is None else feature_strength[:, None].to(values.dtype)
    return _sums(strength, groups) / features * (features * values.shape[1]).sqrt()


def spread_out(blocks: Tensor, groups: Tensor | None) -> Tensor:
    """Return the value of each feature's block as a column, ``(features, 1)``."""
    return (blocks if groups is None else blocks[groups])[:, None]


def shrink_blocks(values: Tensor, thresholds: Tensor, groups: Tensor | None) -> Tensor:
    r"""Return the proximal map of the norms of the blocks, where entries may have thresholds of their own.

    The map multiplies entry ``i`` by :math:`\theta / (\theta + t_i)`, where :math:`\theta`, the norm of the outcome,
    solves :math:`\lVert u / (\theta + t) \rVert = 1`; with one threshold it is :math:`\max(\lVert u \rVert - t, 0)`.
    The reciprocal of that norm is concave in :math:`\theta`: Newton's method on it climbs to the root from below, in a
    single step where a block has one threshold, and falls to zero or below where the whole block has to vanish.

    Args:
        values: Weights of each feature.
        thresholds: Threshold of each feature, or of each entry; not negative.
        groups: Label of each feature's block, equal in threshold if there is one by feature.

    Shape:
        - values, output: ``(features, entries)``
        - thresholds: ``(features, 1)`` or ``(features, entries)``
        - groups: ``(features,)``
    """
    below = block_norm(thresholds.expand_as(values), groups)
    theta = (block_norm(values, groups) - below).relu()
    for _ in range(1 if thresholds.shape[1] == 1 else _NEWTON_STEPS):
        denominator = (spread_out(theta, groups) + thresholds).clamp_min(_FLOOR)
        ratio = values / denominator
        square = _sums(ratio.square(), groups)
        slope = _sums(ratio.square() / denominator, groups).clamp_min(_FLOOR)
        theta = (theta + (square.sqrt() - 1) * square / slope).relu()
    column = spread_out(theta, groups)
    return values * (column / (column + thresholds).clamp_min(_FLOOR))


def _sums(values: Tensor, groups: Tensor | None) -> Tensor:
    """Return the sum over each block of ``(features, entries)``, as ``(features,)``."""
    per_feature = values.sum(dim=1)
    return per_feature if groups is None else torch.zeros_like(per_feature).index_add(0, groups, per_feature)
