"""LDAM: larger margins for rarer classes, then, late in training, class-balanced weights on top."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from losses._checks import check_shape, check_within, class_counts_tensor, in_range
from losses.classification._base import ClassificationLoss, shown_counts
from losses.classification._per_sample import check_logits
from losses.classification._shifted import shifted_classification_loss
from losses.classification.class_balanced import effective_number_weights

__all__ = ["LDAMLoss", "ldam_loss", "ldam_margins"]


def ldam_margins(class_counts: Tensor | Sequence[float], max_margin: float = 0.5) -> Tensor:
    r"""Return the margin of each class: the rarer, the larger.

    .. math::
        m_c = m_{\max} \frac{n_c^{-1/4}}{\max_k n_k^{-1/4}}

    The rarest class with samples gets ``max_margin``, and so does a class without any.

    Args:
        class_counts: Number of training samples of each class.
        max_margin: Largest margin, in units of the unscaled logits.

    Shape:
        - class_counts, output: ``(classes,)``

    Raises:
        ValueError: If ``max_margin`` is negative, or a count is negative or not finite, or all are zero.

    Example:
        >>> ldam_margins([1600, 16, 1])
        tensor([0.0791, 0.2500, 0.5000])

    References:
        Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS 2019, Section 3.
    """
    in_range("max_margin", max_margin, 0)
    counts = class_counts_tensor(class_counts)
    rarest = counts[counts > 0].min()
    return (max_margin * (rarest / counts.clamp(min=rarest)) ** 0.25).to(torch.get_default_dtype())


def ldam_loss(
    logits: Tensor,
    target: Tensor,
    *,
    margins: Tensor,
    scale: float = 30.0,
    class_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    group: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    r"""Compute cross entropy with a margin that depends on the target class.

    .. math::
        \ell_n = -s_n w_{g_n, y_n} \log \operatorname{softmax}\bigl(s (z_n - m_{y_n} e_{y_n})\bigr)_{y_n}

    Use it where rare classes are missed although the network fits its training data: unlike weights, margins do not
    fade. The defaults are meant for logits that are cosines, from a classifier with normalised features and weights
    (see the example of :class:`LDAMLoss`). With ordinary logits take ``scale=1``, since margin and scale are in their
    units. Predict by the plain logits. It costs what cross entropy costs. Half precision is scaled in float32.

    Args:
        logits: Cosines, or other unnormalised scores.
        target: Class indices; class probabilities have no class of their own to put a margin on.
        margins: Margin of each class, as :func:`ldam_margins` returns them.
        scale: Factor of the logits after the margin.
        class_weight: Weight of each class, or of each class in each group; ``None`` means one.
        sample_weight: Weight of each sample, or of each sample and position; ``None`` means one.
        group: Group index of each sample, for a ``class_weight`` with one row per group.
        reduction: ``"mean"`` over what is not ignored, ``"sum"`` or ``"none"``.
        ignore_index: Class index that contributes neither loss nor count.

    Shape:
        - logits: ``(samples, classes)`` or ``(samples, classes, positions...)``
        - target: ``(samples, positions...)`` integer
        - margins: ``(classes,)``
        - class_weight: ``(classes,)`` or ``(groups, classes)``
        - sample_weight: ``(samples,)`` or ``(samples, positions...)``
        - group: ``(samples,)`` integer
        - output: scalar, or ``(samples, positions...)`` for ``reduction="none"``; in nats

    Raises:
        ValueError: If a shape does not fit, ``scale`` is negative, ``class_weight`` has rows for groups but ``group``
            is missing, or (checked on the CPU only) a margin is negative or not finite, or a class or group index is
            out of range.
        TypeError: If ``target`` or ``group`` does not hold integers.

    Example:
        >>> import torch
        >>> logits = torch.zeros(1, 2, requires_grad=True)
        >>> loss = ldam_loss(logits, torch.tensor([1]), margins=torch.tensor([0.1, 0.5]), scale=2.0)
        >>> loss
        tensor(1.3133, grad_fn=<DivBackward0>)
        >>> loss.backward()
        >>> logits.grad
        tensor([[ 1.4621, -1.4621]])

    References:
        Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS 2019, Section 3.
    """
    check_logits(logits)
    check_shape("margins", margins, logits.shape[1:2], "(classes,)")
    check_within("margins", margins.detach(), 0, torch.finfo(margins.dtype).max)
    return shifted_classification_loss(
        logits,
        target,
        scale=in_range("scale", scale, 0),
        margins=margins,
        class_weight=class_weight,
        sample_weight=sample_weight,
        group=group,
        reduction=reduction,
        ignore_index=ignore_index,
    )


class LDAMLoss(ClassificationLoss):
    """Cross entropy with larger margins for rarer classes, and deferred re-weighting; see :func:`ldam_loss`.

    The buffer ``class_weight`` (ones, until :meth:`start_reweighting` or :meth:`~ClassificationLoss.set_class_weight`
    changes it) is part of the state dict; the buffer ``margins``, which follows from the counts, is not.

    Args:
        class_counts: Number of training samples of each class.
        max_margin: Margin of the rarest class, in units of the unscaled logits.
        scale: Factor of the logits after the margin; 30 is for cosines, take 1 for ordinary logits.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        ignore_index: Class index that contributes neither loss nor count.

    Shape:
        - class_counts: ``(classes,)``
        - forward: as :func:`ldam_loss`

    Raises:
        ValueError: If an argument is out of its range, a count is negative or not finite, or all are zero.

    Example:
        >>> import torch
        >>> from torch.nn import functional as F
        >>> criterion = LDAMLoss([900, 90, 10])
        >>> features, prototypes = torch.eye(3), torch.eye(3).requires_grad_()
        >>> cosines = F.normalize(features) @ F.normalize(prototypes).T  # in [-1, 1]
        >>> criterion(cosines, torch.tensor([0, 1, 2])).backward()
        >>> criterion.start_reweighting()  # late: after epoch 160 of 200 in the paper
        >>> criterion.class_weight
        tensor([0.0310, 0.2980, 2.6710])

    References:
        Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS 2019, Section 3.
    """

    margins: Tensor

    def __init__(
        self,
        class_counts: Tensor | Sequence[float],
        max_margin: float = 0.5,
        scale: float = 30.0,
        *,
        reduction: str = "mean",
        ignore_index: int = -100,
    ) -> None:
        counts = class_counts_tensor(class_counts)
        super().__init__(len(counts), reduction=reduction, ignore_index=ignore_index)
        self.class_counts: list[float] = counts.tolist()
        self.max_margin = max_margin
        self.scale = in_range("scale", scale, 0)
        self.register_buffer("margins", ldam_margins(counts, max_margin), persistent=False)

    def start_reweighting(self, beta: float = 0.9999) -> None:
        """Weigh classes by their effective number of samples from now on; see :func:`effective_number_weights`.

        Call it late, once the margins have shaped the features: weights from the start are worse than none.

        Args:
            beta: Between 0 (no weights) and 1 (inverse frequency).
        """
        self.set_class_weight(effective_number_weights(self.class_counts, beta))

    def _loss(self, logits: Tensor, target: Tensor, **common: Any) -> Tensor:
        return ldam_loss(logits, target, margins=self.margins, scale=self.scale, **common)

    def _settings(self) -> list[str]:
        return [shown_counts(self.class_counts), f"max_margin={self.max_margin}, scale={self.scale}"]
