"""Balanced softmax: each class's exponential counts as often as the class was seen in training."""

from __future__ import annotations

from losses.classification.logit_adjustment import LogitAdjustedLoss
from losses.classification.prior import Counts, shown_table

__all__ = ["BalancedSoftmaxLoss"]


class BalancedSoftmaxLoss(LogitAdjustedLoss):
    r"""Cross entropy of a softmax that counts each class as often as it was seen.

    .. math::
        \ell_n = -\log \frac{n_{y_n} e^{z_{n, y_n}}}{\sum_c n_c e^{z_{n, c}}}

    The same as :class:`LogitAdjustedLoss` at ``tau=1``, under its other name; :func:`logit_adjusted_loss` is the
    function. The buffer ``adjustment`` holds ``log(n_c / sum n)``: the softmax does not see the constant.

    Args:
        class_counts: Number of training samples of each class, or of each class in each group, or its share; a class
            without any counts as one sample. With a row a group the loss needs ``group=``.
        label_smoothing: Share of the target that is spread evenly over all classes, from 0 to 1.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        ignore_index: Class index that contributes neither loss nor count.

    Shape:
        - class_counts: ``(classes,)`` or ``(groups, classes)``
        - forward: as :func:`logit_adjusted_loss`

    Raises:
        ValueError: If an argument is out of its range, a count is negative or not finite, or all are zero.

    Example:
        >>> import torch
        >>> criterion = BalancedSoftmaxLoss([75, 25])
        >>> logits = torch.zeros(1, 2, requires_grad=True)
        >>> loss = criterion(logits, torch.tensor([1]))
        >>> loss.backward()
        >>> loss
        tensor(1.3863, grad_fn=<DivBackward0>)

    References:
        Ren et al., "Balanced Meta-Softmax for Long-Tailed Visual Recognition", NeurIPS 2020.
    """

    def __init__(
        self,
        class_counts: Counts,
        *,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        ignore_index: int = -100,
    ) -> None:
        super().__init__(
            class_counts, 1.0, label_smoothing=label_smoothing, reduction=reduction, ignore_index=ignore_index
        )

    def _settings(self) -> list[str]:
        return [shown_table(self.class_counts), f"label_smoothing={self.label_smoothing}"]
