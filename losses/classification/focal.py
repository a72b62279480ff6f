"""Focal loss: what the model already gets right costs next to nothing, so that the hard samples set the gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from losses._checks import in_range
from losses.classification._base import ClassificationLoss, Weights
from losses.classification._per_sample import Modulation, classification_loss

__all__ = ["FocalLoss", "focal_loss"]


def focal_loss(
    logits: Tensor,
    target: Tensor,
    *,
    gamma: float = 2.0,
    class_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    group: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    r"""Compute the focal loss over a softmax.

    .. math::
        \ell_n = -s_n \sum_c w_{g_n, c} \, t_{n, c} \, (1 - p_{n, c})^\gamma \log p_{n, c}, \qquad
        p_n = \operatorname{softmax}(z_n)

    Use it where easy samples drown the hard ones; with noisy labels it chases the wrong ones. The probability ``p`` is
    that of the plain softmax: weights scale the loss and never change what counts as easy. At ``gamma=0`` it is
    :func:`weighted_cross_entropy`. It costs what cross entropy costs, but for a few values per sample. The gradient is
    finite for every ``gamma``, also where ``p`` reaches one.

    Args:
        logits: Unnormalised scores.
        target: Class indices, or class probabilities in the shape of ``logits``.
        gamma: Focus, at least 0: a sample with ``p = 0.9`` counts ``0.1 ** gamma`` of what it would.
        class_weight: Weight of each class (the paper's alpha), or of each class in each group; ``None`` means one.
        sample_weight: Weight of each sample, or of each sample and position; ``None`` means one.
        group: Group index of each sample, for a ``class_weight`` with one row per group.
        reduction: ``"mean"`` over what is not ignored, ``"sum"`` or ``"none"``.
        ignore_index: Class index that contributes neither loss nor count.

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
        >>> logits = torch.zeros(1, 2, requires_grad=True)
        >>> loss = focal_loss(logits, torch.tensor([1]))
        >>> loss
        tensor(0.1733, grad_fn=<DivBackward0>)
        >>> loss.backward()
        >>> logits.grad
        tensor([[ 0.2983, -0.2983]])

    References:
        Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017 (there over a sigmoid, see
        :func:`sigmoid_focal_loss`).
    """
    in_range("gamma", gamma, 0)
    return classification_loss(
        logits,
        target,
        class_weight=class_weight,
        sample_weight=sample_weight,
        group=group,
        reduction=reduction,
        ignore_index=ignore_index,
        modulate=_focal_modulation(gamma),
    )


class FocalLoss(ClassificationLoss):
    """Focal loss over a softmax, whose class weights can be set during training; see :func:`focal_loss`.

    Args:
        gamma: Focus, at least 0; 0 is cross entropy.
        class_weight: Initial class weights, repeated for every group if given by class; ``None`` for a loss without,
            which needs no number of classes. Pass ones if weights are to be set later.
        num_groups: Number of groups with class weights of their own; ``None`` keeps one weight per class.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        ignore_index: Class index that contributes neither loss nor count.

    Shape:
        - class_weight: ``(classes,)`` or ``(num_groups, classes)``
        - forward: as :func:`focal_loss`

    Raises:
        ValueError: If an argument is out of its range, or ``class_weight`` has the wrong shape or a negative or
            non-finite value.

    Example:
        >>> import torch
        >>> criterion = FocalLoss(gamma=1.0)
        >>> logits = torch.zeros(2, 3, requires_grad=True)
        >>> loss = criterion(logits, torch.tensor([0, 2]))
        >>> loss.backward()
        >>> loss
        tensor(0.7324, grad_fn=<DivBackward0>)
    """

    def __init__(
        self,
        gamma: float = 2.0,
        *,
        class_weight: Weights | None = None,
        num_groups: int | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
    ) -> None:
        super().__init__(None, class_weight, num_groups=num_groups, reduction=reduction, ignore_index=ignore_index)
        self.gamma = in_range("gamma", gamma, 0)

    def _loss(self, logits: Tensor, target: Tensor, **common: Any) -> Tensor:
        return focal_loss(logits, target, gamma=self.gamma, **common)

    def _settings(self) -> list[str]:
        return [f"gamma={self.gamma}"]


def _focal_modulation(gamma: float) -> Modulation | None:
    """Return ``(1 - p) ** gamma`` as a function of ``log p``, with a finite gradient at ``p = 1``; ``None`` for one."""
    if gamma == 0:
        return None

    def modulate(scores: Tensor) -> Tensor:
        missing = -torch.expm1(scores)  # 1 - p, exact also where p is next to one
        return missing.clamp_min(torch.finfo(missing.dtype).tiny) ** gamma

    return modulate
