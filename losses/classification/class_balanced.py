"""Class-balanced cross entropy: weights by the effective number of samples, between none and inverse frequency."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from losses._checks import class_counts_tensor, in_range
from losses.classification._base import ClassificationLoss, shown_counts
from losses.classification.weighted import weighted_cross_entropy

__all__ = ["ClassBalancedLoss", "class_balanced_loss", "effective_number_weights"]


def effective_number_weights(class_counts: Tensor | Sequence[float], beta: float = 0.9999) -> Tensor:
    r"""Weigh classes by the inverse of their effective number of samples.

    .. math::
        w_c \propto \frac{1 - \beta}{1 - \beta^{n_c}}, \qquad \sum_c w_c = C

    ``beta=0`` weighs all classes alike, ``beta=1`` by inverse frequency; between, classes with far more than
    ``1 / (1 - beta)`` samples are treated alike. Exact for large counts and ``beta`` next to one.

    A class without samples gets weight one, the average, and changes no other weight: it cannot be estimated, and
    never occurs as a target of the training data.

    Args:
        class_counts: Number of training samples of each class.
        beta: Between 0 and 1.

    Shape:
        - class_counts, output: ``(classes,)``

    Raises:
        ValueError: If ``beta`` is out of its range, or a count is negative or not finite, or all are zero.

    Example:
        >>> effective_number_weights([1000, 100, 10], beta=0.99)
        tensor([0.2301, 0.3630, 2.4068])

    References:
        Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019, Section 4.
    """
    in_range("beta", beta, 0, 1)
    counts = class_counts_tensor(class_counts)
    filled = counts > 0
    counts = counts.clamp(min=torch.finfo(counts.dtype).tiny)
    if beta == 1:
        weights = 1 / counts
    elif beta == 0:
        weights = torch.ones_like(counts)
    else:
        weights = -(1 - beta) / torch.expm1(counts * math.log(beta))
    weights = torch.where(filled, weights, 0.0)
    weights = weights * filled.sum() / weights.sum()
    return torch.where(filled, weights, 1.0).to(torch.get_default_dtype())


def class_balanced_loss(
    logits: Tensor,
    target: Tensor,
    *,
    class_counts: Tensor | Sequence[float],
    beta: float = 0.9999,
    class_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    group: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Compute cross entropy weighted by the inverse effective number of samples of each class.

    .. math::
        \ell_n = -w_{y_n} \log \operatorname{softmax}(z_n)_{y_n}, \qquad
        w_c \propto \frac{1 - \beta}{1 - \beta^{n_c}}

    Use it early in training or with strong regularisation: once a network fits its training data, weights stop to
    matter, and a loss with margins does more for rare classes. It is :func:`weighted_cross_entropy` with the weights of
    :func:`effective_number_weights`, computed and checked in every call; the module does so once.

    Args:
        logits: Unnormalised scores.
        target: Class indices, or class probabilities in the shape of ``logits``.
        class_counts: Number of training samples of each class.
        beta: Between 0 (cross entropy) and 1 (inverse frequency).
        class_weight: Further weight of each class, or of each class in each group; ``None`` means one.
        sample_weight: Weight of each sample, or of each sample and position; ``None`` means one.
        group: Group index of each sample, for a ``class_weight`` with one row per group.
        reduction: ``"mean"`` over what is not ignored, ``"sum"`` or ``"none"``.
        ignore_index: Class index that contributes neither loss nor count.
        label_smoothing: Share of the target that is spread evenly over all classes, from 0 to 1.

    Shape:
        - logits: ``(samples, classes)`` or ``(samples, classes, positions...)``
        - target: ``(samples, positions...)`` integer, or the shape of ``logits`` floating
        - class_counts: ``(classes,)``
        - class_weight: ``(classes,)`` or ``(groups, classes)``
        - sample_weight: ``(samples,)`` or ``(samples, positions...)``
        - group: ``(samples,)`` integer
        - output: scalar, or ``(samples, positions...)`` for ``reduction="none"``; in nats

    Raises:
        ValueError: If a shape does not fit, an argument is out of its range, a count is negative or not finite, all
            are zero, or (checked on the CPU only) a class or group index is out of range.
        TypeError: If ``target`` or ``group`` has the wrong dtype.

    Example:
        >>> import torch
        >>> logits = torch.zeros(2, 2, requires_grad=True)
        >>> loss = class_balanced_loss(logits, torch.tensor([0, 1]), class_counts=[90, 10], beta=1.0)
        >>> loss
        tensor(0.6931, grad_fn=<DivBackward0>)
        >>> loss.backward()
        >>> logits.grad
        tensor([[-0.0500,  0.0500],
                [ 0.4500, -0.4500]])

    References:
        Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019, Section 4.
    """
    weight = effective_number_weights(class_counts, beta).to(logits.device)
    return weighted_cross_entropy(
        logits,
        target,
        class_weight=weight if class_weight is None else weight * class_weight,
        sample_weight=sample_weight,
        group=group,
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )


class ClassBalancedLoss(ClassificationLoss):
    """Cross entropy that starts from effective-number weights, which may change; see :func:`class_balanced_loss`.

    Args:
        class_counts: Number of training samples of each class.
        beta: Between 0 (cross entropy) and 1 (inverse frequency).
        label_smoothing: Share of the target that is spread evenly over all classes, from 0 to 1.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        ignore_index: Class index that contributes neither loss nor count.

    Shape:
        - class_counts: ``(classes,)``
        - forward: as :func:`weighted_cross_entropy`; a ``class_weight`` given there replaces the weights

    Raises:
        ValueError: If an argument is out of its range, a count is negative or not finite, or all are zero.

    Example:
        >>> import torch
        >>> criterion = ClassBalancedLoss([900, 90, 10])
        >>> criterion.class_weight
        tensor([0.0310, 0.2980, 2.6710])
        >>> logits = torch.zeros(1, 3, requires_grad=True)
        >>> loss = criterion(logits, torch.tensor([2]))
        >>> loss.backward()
        >>> loss
        tensor(2.9345, grad_fn=<DivBackward0>)
    """

    def __init__(
        self,
        class_counts: Tensor | Sequence[float],
        beta: float = 0.9999,
        *,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        ignore_index: int = -100,
    ) -> None:
        counts = class_counts_tensor(class_counts)
        weight = effective_number_weights(counts, beta)
        super().__init__(len(counts), weight, reduction=reduction, ignore_index=ignore_index)
        self.class_counts: list[float] = counts.tolist()
        self.beta = beta
        self.label_smoothing = in_range("label_smoothing", label_smoothing, 0, 1)

    def _loss(self, logits: Tensor, target: Tensor, **common: Any) -> Tensor:
        return weighted_cross_entropy(logits, target, label_smoothing=self.label_smoothing, **common)

    def _settings(self) -> list[str]:
        return [shown_counts(self.class_counts), f"beta={self.beta}, label_smoothing={self.label_smoothing}"]
