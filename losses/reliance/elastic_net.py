"""Elastic net on weights: absolute values for sparsity, squares for stability, by feature."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from losses._checks import check_shape, in_range
from losses.reliance._proximal import ProximalPenalty, StepSize, feature_rows

__all__ = ["ElasticNetPenalty", "elastic_net"]


def elastic_net(
    weight: Tensor | Sequence[Tensor],
    *,
    l1: float,
    l2: float,
    dim: int = 1,
    feature_strength: Tensor | None = None,
) -> Tensor:
    r"""Penalise absolute values and squares of weights, each input feature with its own strength.

    .. math::
        L = \sum_g c_g \bigl(\lambda_1 \lVert W_{:, g} \rVert_1 + \lambda_2 \lVert W_{:, g} \rVert_2^2 \bigr)

    Use it where single weights should vanish, and :func:`~losses.reliance.group_lasso.group_lasso` where whole features
    should. As a term of the loss it makes weights small, never zero: for zeros, attach an :class:`ElasticNetPenalty` to
    the optimiser. Two passes over the weights. At a weight of exactly zero the gradient is zero.

    Args:
        weight: One weight or several with the same features: a first layer, an embedding, a value projection.
        l1: Strength of the absolute values.
        l2: Strength of the squares; without a half, as in the paper. Not decoupled weight decay.
        dim: Axis that counts features: 1 for the inputs of a ``Linear`` or a convolution and the values of an
            embedding, 0 for its rows.
        feature_strength: Factor of each feature; ``None`` means one.

    Shape:
        - weight: any with an axis ``dim``
        - feature_strength: ``(features,)``
        - output: scalar

    Raises:
        ValueError: If a shape does not fit, or a strength is negative or not finite.
        TypeError: If a weight is no floating tensor.

    Example:
        >>> import torch
        >>> weight = torch.tensor([[1.0, 0.0], [-2.0, 0.5]], requires_grad=True)
        >>> loss = elastic_net(weight, l1=1.0, l2=0.5)
        >>> loss
        tensor(6.1250, grad_fn=<SumBackward0>)
        >>> loss.backward()
        >>> weight.grad
        tensor([[ 2.0000,  0.0000],
                [-3.0000,  1.5000]])

    References:
        Zou and Hastie, "Regularization and Variable Selection via the Elastic Net", JRSS B 2005, equation 3: the
        naive elastic net.
    """
    in_range("l1", l1, 0)
    in_range("l2", l2, 0)
    costs = [l1 * rows.abs().sum(dim=1) + l2 * rows.square().sum(dim=1) for rows in feature_rows(weight, dim)]
    cost = torch.stack(costs).sum(dim=0)  # (features,)
    if feature_strength is not None:
        check_shape("feature_strength", feature_strength, cost.shape, "(features,)")
        cost = cost * feature_strength.to(cost.dtype)
    return cost.sum()


class ElasticNetPenalty(ProximalPenalty):
    r"""Penalise weights by feature, in the loss or with exact zeros after each step; see :func:`elastic_net`.

    Two ways to use it, never both for one weight: add ``penalty(weight)`` to the loss, or call
    ``penalty.attach(optimizer, weight)`` once, after which each step ends with

    .. math::
        w \leftarrow \frac{\operatorname{sign}(w) \max(|w| - \eta c \lambda_1, 0)}{1 + 2 \eta c \lambda_2}

    where :math:`\eta` is the step size of the entry; see :meth:`attach`. The weight is passed each time: the penalty
    holds none.

    Args:
        l1: Strength of the absolute values.
        l2: Strength of the squares.
        dim: Axis that counts features.
        num_features: Number of features with strengths of their own; ``None`` takes it from ``feature_strength``, or
            builds a penalty without any.
        feature_strength: Initial factor of each feature; ``None`` means one. See :meth:`set_feature_strength`.

    Shape:
        - feature_strength: ``(num_features,)``
        - forward: as :func:`elastic_net`

    Raises:
        ValueError: If a strength is negative or not finite, or a shape does not fit.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 1)
        >>> penalty = ElasticNetPenalty(l1=0.1, l2=0.01, num_features=3)
        >>> penalty.set_feature_strength([0.0, 1.0, 1.0])  # the first input is trusted
        >>> penalty(model.weight).backward()
        >>> model.weight.grad[0, 0]
        tensor(0.)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> handle = penalty.attach(optimizer, model.weight)
        >>> penalty(model.weight).requires_grad
        False
    """

    def __init__(
        self,
        l1: float,
        l2: float,
        *,
        dim: int = 1,
        num_features: int | None = None,
        feature_strength: Tensor | Sequence[float] | None = None,
    ) -> None:
        super().__init__(dim, num_features, feature_strength)
        self.l1 = in_range("l1", l1, 0)
        self.l2 = in_range("l2", l2, 0)

    def extra_repr(self) -> str:
        """Show how to build the penalty again, strengths of features aside."""
        return f"l1={self.l1}, l2={self.l2}, dim={self.dim}, num_features={self.num_features}"

    def _value(self, weight: Tensor | Sequence[Tensor]) -> Tensor:
        table = None if self.feature_strength is None else self.feature_strength.detach().clone()
        return elastic_net(weight, l1=self.l1, l2=self.l2, dim=self.dim, feature_strength=table)

    def _pulls(self, weights: list[Tensor]) -> list[Tensor]:
        return [self._factor(weight) * (self.l1 + 2 * self.l2 * weight.abs()) for weight in weights]

    def _shrink(self, weights: list[Tensor], lrs: list[StepSize]) -> None:
        for weight, lr in zip(weights, lrs, strict=True):
            step = lr * self._factor(weight)
            shrunk = weight.sign() * (weight.abs() - step * self.l1).clamp_min(0.0)
            weight.copy_(shrunk / (1 + 2 * step * self.l2))

    def _factor(self, weight: Tensor) -> Tensor:
        """Return the strength of each feature, in a shape that multiplies ``weight``."""
        axes = [1] * weight.dim()
        if self.feature_strength is None:
            return weight.new_ones(axes, dtype=torch.float32)
        axes[self.dim] = -1
        return self.feature_strength.reshape(axes)
