"""Cross entropy whose class weights may change between any two steps, by class or by class and group."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from losses._checks import in_range
from losses.classification._base import ClassificationLoss, Weights
from losses.classification._per_sample import classification_loss

__all__ = ["WeightedCrossEntropyLoss", "weighted_cross_entropy"]


def weighted_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    class_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    group: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Compute cross entropy with weights by class, by class and group, and by sample.

    .. math::
        \ell_n = -s_n \sum_c w_{g_n, c} \, t_{n, c} \log \operatorname{softmax}(z_n)_c, \qquad
        L = \frac{1}{N} \sum_n \ell_n

    with ``N`` the number of samples (and positions) that are not ignored. Unlike ``F.cross_entropy(weight=...)``, the
    mean does not divide by the batch's sum of weights: a batch of one keeps its weight, and the mean over micro-batches
    of equal size is the mean over the whole batch. Under autocast and in half precision the sum runs in float32.

    Args:
        logits: Unnormalised scores.
        target: Class indices, or class probabilities in the shape of ``logits``.
        class_weight: Weight of each class, or of each class in each group; ``None`` means one. Values are not checked
            here, since that would wait for the device in every step.
        sample_weight: Weight of each sample, or of each sample and position; ``None`` means one.
        group: Group index of each sample. Picks the row of a ``class_weight`` with one row per group, else unused.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        ignore_index: Class index that contributes neither loss nor count. Unused with class probabilities.
        label_smoothing: Share of the target that is spread evenly over all classes, from 0 to 1.

    Shape:
        - logits: ``(samples, classes)`` or ``(samples, classes, positions...)``
        - target: ``(samples, positions...)`` integer, or the shape of ``logits`` floating
        - class_weight: ``(classes,)`` or ``(groups, classes)``
        - sample_weight: ``(samples,)`` or ``(samples, positions...)``
        - group: ``(samples,)`` integer
        - output: scalar, or ``(samples, positions...)`` for ``reduction="none"``; in nats

    Raises:
        ValueError: If a shape does not fit, an argument is out of its range, ``class_weight`` has rows for groups but
            ``group`` is missing, or (checked on the CPU only) a class or group index is out of range.
        TypeError: If ``target`` or ``group`` has the wrong dtype.

    Example:
        >>> import torch
        >>> logits = torch.zeros(2, 2, requires_grad=True)
        >>> loss = weighted_cross_entropy(logits, torch.tensor([0, 1]), class_weight=torch.tensor([1.0, 3.0]))
        >>> loss
        tensor(1.3863, grad_fn=<DivBackward0>)
        >>> loss.backward()
        >>> logits.grad
        tensor([[-0.2500,  0.2500],
                [ 0.7500, -0.7500]])

    References:
        Byrd and Lipton, "What is the Effect of Importance Weighting in Deep Learning?", ICML 2019: weights fade once
        the training loss reaches zero, so combine them with early stopping or regularisation.
    """
    return classification_loss(
        logits,
        target,
        class_weight=class_weight,
        sample_weight=sample_weight,
        group=group,
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )


class WeightedCrossEntropyLoss(ClassificationLoss):
    """Cross entropy with class weights that can be set during training; see :func:`weighted_cross_entropy`.

    The weights live in the buffer ``class_weight``, which :meth:`set_class_weight` changes in place: a compiled step is
    not compiled again, distributed copies stay valid, and the state dict keeps them.

    Args:
        num_classes: Number of classes.
        weight: Initial weights; ``None`` means one everywhere. Weights by class are repeated for every group.
        num_groups: Number of groups with weights of their own; ``None`` keeps one weight per class.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        ignore_index: Class index that contributes neither loss nor count.
        label_smoothing: Share of the target that is spread evenly over all classes, from 0 to 1.

    Shape:
        - weight: ``(num_classes,)`` or ``(num_groups, num_classes)``
        - forward: as :func:`weighted_cross_entropy`

    Raises:
        ValueError: If a count is below one, ``weight`` has the wrong shape or a negative or non-finite value, or
            another argument is out of its range.

    Example:
        >>> import torch
        >>> criterion = WeightedCrossEntropyLoss(3)
        >>> criterion.set_class_weight([1.0, 2.0, 0.5])
        >>> logits = torch.zeros(1, 3, requires_grad=True)
        >>> loss = criterion(logits, torch.tensor([1]))
        >>> loss.backward()
        >>> loss
        tensor(2.1972, grad_fn=<DivBackward0>)
    """

    class_weight: Tensor

    def __init__(
        self,
        num_classes: int,
        weight: Weights | None = None,
        *,
        num_groups: int | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(num_classes, weight, num_groups=num_groups, reduction=reduction, ignore_index=ignore_index)
        self.label_smoothing = in_range("label_smoothing", label_smoothing, 0, 1)

    def _loss(self, logits: Tensor, target: Tensor, **common: Any) -> Tensor:
        return weighted_cross_entropy(logits, target, label_smoothing=self.label_smoothing, **common)

    def _settings(self) -> list[str]:
        return [str(self.num_classes), f"label_smoothing={self.label_smoothing}"]
