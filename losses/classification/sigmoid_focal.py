"""Focal loss of one yes-or-no question per label, for binary and multi-label targets, as in dense detection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from losses._checks import REDUCTIONS, accumulation_dtype, check_shape, check_within, in_range, one_of
from losses.classification._base import ClassificationLoss, Weights
from losses.classification._per_sample import reduce, weight_table

__all__ = ["SigmoidFocalLoss", "sigmoid_focal_loss"]


def sigmoid_focal_loss(
    logits: Tensor,
    target: Tensor,
    *,
    gamma: float = 2.0,
    alpha: float | None = 0.25,
    class_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    group: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    r"""Compute the focal loss over a sigmoid for every label of every sample.

    .. math::
        \ell = -\alpha_t (1 - p_t)^\gamma \bigl[t \log p + (1 - t) \log (1 - p)\bigr], \qquad p = \sigma(z), \\
        p_t = t p + (1 - t)(1 - p), \qquad \alpha_t = t \alpha + (1 - t)(1 - \alpha)

    times the weights of class and sample. Use it where most labels are negative. Targets between 0 and 1 follow the
    same formula, with the mixed :math:`p_t`. At ``gamma=0, alpha=None`` it is binary cross entropy. Each label counts
    on its own: the mean is over labels, not over samples, and ``"none"`` returns one value per label. It costs
    several times what binary cross entropy does, unless compiled.

    Detectors divide by the number of positive labels instead: take ``reduction="sum"`` and divide.

    Args:
        logits: Unnormalised scores, one per label.
        target: Whether the label is present, as boolean, integer, or a probability in ``[0, 1]``.
        gamma: Focus, at least 0.
        alpha: Weight of positive labels, with one minus it for negative ones; ``None`` weighs neither.
        class_weight: Weight of each label, positive or negative, or of each label in each group; ``None`` means one.
        sample_weight: Weight of each sample, or of each of its labels; ``None`` means one.
        group: Group index of each sample, for a ``class_weight`` with one row per group.
        reduction: ``"mean"`` over the labels that are not missing, ``"sum"`` or ``"none"``.
        ignore_index: Target value of a missing label, which contributes neither loss nor count.

    Shape:
        - logits, target: ``(samples,)``, ``(samples, classes)`` or ``(samples, classes, positions...)``
        - class_weight: ``(classes,)`` or ``(groups, classes)``; one class where ``logits`` are ``(samples,)``
        - sample_weight: ``(samples,)`` or the shape of ``logits``
        - group: ``(samples,)`` integer
        - output: scalar, or the shape of ``logits`` for ``reduction="none"``; in nats

    Raises:
        ValueError: If a shape does not fit, an argument is out of its range, ``class_weight`` has rows for groups but
            ``group`` is missing, or (checked on the CPU only) a target or group index is out of range.
        TypeError: If ``group`` has the wrong dtype.

    Example:
        >>> import torch
        >>> logits = torch.zeros(1, 2, requires_grad=True)
        >>> loss = sigmoid_focal_loss(logits, torch.tensor([[1, 0]]), reduction="none")
        >>> loss
        tensor([[0.0433, 0.1300]], grad_fn=<MulBackward0>)
        >>> loss.sum().backward()
        >>> logits.grad
        tensor([[-0.0746,  0.2237]])

    References:
        Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, Equation 5 (alpha-balanced form).
    """
    one_of("reduction", reduction, REDUCTIONS)
    in_range("gamma", gamma, 0)
    if alpha is not None:
        in_range("alpha", alpha, 0, 1)
    if not isinstance(logits, Tensor) or logits.dim() == 0:
        raise ValueError("`logits` must be a tensor of shape (samples,) or (samples, classes, positions...).")
    check_shape("target", target, logits.shape, "of `logits`")
    check_within("target", target, 0, 1, skip=ignore_index)
    table = weight_table(class_weight, group, logits.shape[0], logits.shape[1] if logits.dim() > 1 else 1)
    counted = target != ignore_index
    dtype = accumulation_dtype(logits)
    present = torch.where(counted, target, 0).to(dtype)
    scores = torch.where(counted, logits.to(dtype), 0.0)  # a product would keep what is not finite
    losses = _label_losses(scores, present, gamma)
    return reduce(losses * _label_weight(present, counted, alpha, table), sample_weight, counted, reduction)


class SigmoidFocalLoss(ClassificationLoss):
    """Focal loss for binary and multi-label targets; see :func:`sigmoid_focal_loss`.

    Args:
        gamma: Focus, at least 0.
        alpha: Weight of positive labels, with one minus it for negative ones; ``None`` weighs neither.
        class_weight: Initial weights of the labels, repeated for every group if given by class; ``None`` for a loss
            without. Pass ones if weights are to be set later.
        num_groups: Number of groups with class weights of their own; ``None`` keeps one weight per class.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        ignore_index: Target value of a missing label, which contributes neither loss nor count.

    Shape:
        - class_weight: ``(classes,)`` or ``(num_groups, classes)``
        - forward: as :func:`sigmoid_focal_loss`

    Raises:
        ValueError: If an argument is out of its range, or ``class_weight`` has the wrong shape or a negative or
            non-finite value.

    Example:
        >>> import torch
        >>> criterion = SigmoidFocalLoss(alpha=None)
        >>> logits = torch.zeros(2, requires_grad=True)
        >>> loss = criterion(logits, torch.tensor([True, False]))
        >>> loss.backward()
        >>> loss
        tensor(0.1733, grad_fn=<DivBackward0>)
    """

    def __init__(
        self,
        gamma: float = 2.0,
        alpha: float | None = 0.25,
        *,
        class_weight: Weights | None = None,
        num_groups: int | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
    ) -> None:
        super().__init__(None, class_weight, num_groups=num_groups, reduction=reduction, ignore_index=ignore_index)
        self.gamma = in_range("gamma", gamma, 0)
        self.alpha = None if alpha is None else in_range("alpha", alpha, 0, 1)

    def _loss(self, logits: Tensor, target: Tensor, **common: Any) -> Tensor:
        return sigmoid_focal_loss(logits, target, gamma=self.gamma, alpha=self.alpha, **common)

    def _settings(self) -> list[str]:
        return [f"gamma={self.gamma}, alpha={self.alpha}"]


def _label_losses(scores: Tensor, target: Tensor, gamma: float) -> Tensor:
    losses = F.binary_cross_entropy_with_logits(scores, target, reduction="none")
    if gamma == 0:
        return losses
    wrong = torch.lerp(scores.sigmoid(), (-scores).sigmoid(), target)  # 1 - p_t, exact also where it is tiny
    return losses * wrong.clamp_min(torch.finfo(wrong.dtype).tiny) ** gamma


def _label_weight(target: Tensor, counted: Tensor, alpha: float | None, table: Tensor | None) -> Tensor:
    """Return the weight of each label in the shape of ``target``, zero where it is missing."""
    weight = counted.to(target.dtype)
    if alpha is not None:
        weight = weight * (1 - alpha + (2 * alpha - 1) * target)
    if table is None:
        return weight
    return weight * table.to(weight.dtype).reshape(*table.shape[: weight.dim()], *[1] * (weight.dim() - 2))
