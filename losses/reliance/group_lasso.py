"""Group lasso on weights: a whole input feature is kept or dropped."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence

import torch
from torch import Tensor

from losses._checks import check_shape, check_within, in_range
from losses.reliance._blocks import block_factor, block_norm, shrink_blocks, spread_out
from losses.reliance._proximal import ProximalPenalty, StepSize, feature_rows

__all__ = ["GroupLassoPenalty", "group_lasso"]

_FLOOR = 1e-10


def group_lasso(
    weight: Tensor | Sequence[Tensor],
    *,
    strength: float = 1.0,
    dim: int = 1,
    feature_strength: Tensor | None = None,
    groups: Tensor | None = None,
) -> Tensor:
    r"""Penalise the norm of all weights that read an input feature, so that features vanish as a whole.

    .. math::
        L = \lambda \sum_g c_g \sqrt{p_g} \, \lVert W_{:, g} \rVert_2

    with :math:`p_g` the number of weights in the group. By default a group is one feature on axis ``dim``, across all
    the weights that are given; ``groups`` joins features, such as the columns of one categorical variable. As a term of
    the loss it makes groups small, never zero: for zeros, attach a :class:`GroupLassoPenalty` to the optimiser. One
    pass over the weights. At a group of exact zeros the gradient is zero.

    Args:
        weight: One weight or several with the same features: a first layer, an embedding, a value projection.
        strength: Factor on the sum.
        dim: Axis that counts features: 1 for the inputs of a ``Linear`` or a convolution and the values of an
            embedding, 0 for its rows.
        feature_strength: Factor of each feature; ``None`` means one. A group has the mean of its features.
        groups: Label of each feature's group, from 0 up to at most the number of features less one; ``None`` makes
            every feature a group.

    Shape:
        - weight: any with an axis ``dim``
        - feature_strength: ``(features,)``
        - groups: ``(features,)`` integer
        - output: scalar

    Raises:
        ValueError: If a shape does not fit, ``strength`` is negative or not finite, or (checked on the CPU only) a
            label is out of range.
        TypeError: If a weight is no floating tensor, or ``groups`` holds no integers.

    Example:
        >>> import torch
        >>> weight = torch.tensor([[3.0, 0.0], [4.0, 0.0]], requires_grad=True)
        >>> loss = group_lasso(weight)
        >>> loss  # sqrt(2) times 5
        tensor(7.0711, grad_fn=<MulBackward0>)
        >>> loss.backward()
        >>> weight.grad
        tensor([[0.8485, 0.0000],
                [1.1314, 0.0000]])

    References:
        Yuan and Lin, "Model Selection and Estimation in Regression with Grouped Variables", JRSS B 2006, equation
        2.1.
    """
    in_range("strength", strength, 0)
    values = torch.cat(feature_rows(weight, dim), dim=1)
    if feature_strength is not None:
        check_shape("feature_strength", feature_strength, (len(values),), "(features,)")
    if groups is not None:
        groups = _check_groups(groups, len(values))
    return strength * (block_factor(values, feature_strength, groups) * block_norm(values, groups)).sum()


class GroupLassoPenalty(ProximalPenalty):
    r"""Penalise features as a whole, in the loss or with exact zeros after each step; see :func:`group_lasso`.

    Two ways to use it, never both for one weight: add ``penalty(weight)`` to the loss, or call
    ``penalty.attach(optimizer, weight)`` once, after which each step ends with

    .. math::
        W_{:, g} \leftarrow W_{:, g} \max\Bigl(0, \; 1 - \frac{\eta \lambda c_g \sqrt{p_g}}{\lVert W_{:, g} \rVert_2}
        \Bigr)

    or, where the entries of a group have step sizes :math:`\eta` of their own, the proximal map in that metric; see
    :meth:`attach`. The weight is passed each time: the penalty holds none.

    Args:
        strength: Factor on the sum.
        dim: Axis that counts features.
        num_features: Number of features with strengths of their own; ``None`` takes it from ``feature_strength``, or
            builds a penalty without any.
        feature_strength: Initial factor of each feature; ``None`` means one. See :meth:`set_feature_strength`.
        groups: Label of each feature's group; ``None`` makes every feature a group.

    Shape:
        - feature_strength: ``(num_features,)``
        - groups: ``(features,)`` integer
        - forward: as :func:`group_lasso`

    Raises:
        ValueError: If a strength is negative or not finite, or a shape does not fit.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 4)
        >>> penalty = GroupLassoPenalty(strength=0.1)
        >>> penalty(model.weight).backward()
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
        >>> handle = penalty.attach(optimizer, model.weight)
        >>> optimizer.step()
        >>> model.weight.eq(0).all()
        tensor(True)
    """

    groups: Tensor | None

    def __init__(
        self,
        strength: float,
        *,
        dim: int = 1,
        num_features: int | None = None,
        feature_strength: Tensor | Sequence[float] | None = None,
        groups: Tensor | Sequence[int] | None = None,
    ) -> None:
        super().__init__(dim, num_features, feature_strength)
        self.strength = in_range("strength", strength, 0)
        labels = None if groups is None else torch.as_tensor(groups)
        if labels is not None:
            labels = _check_groups(labels, len(labels) if self.num_features is None else self.num_features)
        self.register_buffer("groups", labels, persistent=False)  # a setting, not a state

    def extra_repr(self) -> str:
        """Show how to build the penalty again, strengths of features aside."""
        labels = "" if self.groups is None else f", groups={reprlib.repr(self.groups.tolist())}"
        return f"{self.strength}, dim={self.dim}, num_features={self.num_features}{labels}"

    def _value(self, weight: Tensor | Sequence[Tensor]) -> Tensor:
        table = None if self.feature_strength is None else self.feature_strength.detach().clone()
        return group_lasso(weight, strength=self.strength, dim=self.dim, feature_strength=table, groups=self.groups)

    def _pulls(self, weights: list[Tensor]) -> list[Tensor]:
        values = torch.cat(feature_rows(weights, self.dim), dim=1)
        slope = self._factor(values) / spread_out(block_norm(values, self.groups), self.groups).clamp_min(_FLOOR)
        return self._split(slope * values.abs(), weights)

    def _shrink(self, weights: list[Tensor], lrs: list[StepSize]) -> None:
        values = torch.cat(feature_rows(weights, self.dim), dim=1)
        step = lrs[0]
        if len(weights) > 1 or (isinstance(step, Tensor) and step.dim() > 0):
            step = torch.cat(
                feature_rows([torch.zeros_like(w) + lr for w, lr in zip(weights, lrs, strict=True)], self.dim), dim=1
            )
        shrunk = shrink_blocks(values, step * self._factor(values), self.groups)
        for weight, new in zip(weights, self._split(shrunk, weights), strict=True):
            weight.copy_(new)

    def _factor(self, values: Tensor) -> Tensor:
        """Return the strength of each feature's block, ``(features, 1)``."""
        return self.strength * spread_out(block_factor(values, self.feature_strength, self.groups), self.groups)

    def _split(self, values: Tensor, weights: list[Tensor]) -> list[Tensor]:
        """Return the columns of each weight in that weight's shape."""
        columns = values.split([weight.numel() // len(values) for weight in weights], dim=1)
        moved = [weight.movedim(self.dim, 0).shape for weight in weights]
        return [each.reshape(shape).movedim(0, self.dim) for each, shape in zip(columns, moved, strict=True)]


def _check_groups(groups: Tensor, features: int) -> Tensor:
    check_shape("groups", groups, (features,), "(features,)")
    if groups.is_floating_point() or groups.dtype == torch.bool:
        raise TypeError(f"`groups` must hold integer labels, got {groups.dtype}.")
    check_within("groups", groups, 0, features - 1)
    return groups.long()
