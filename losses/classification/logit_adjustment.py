"""Logit adjustment: train, or predict, with logits shifted by the log frequency of each class, also by group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from losses._checks import check_shape, check_tensor, in_range
from losses.classification._base import ClassificationLoss
from losses.classification._per_sample import classification_loss
from losses.classification._shifted import one_per_class, shift_of_adjustment, shifted_classification_loss
from losses.classification.prior import Counts, checked_counts, log_prior, shown_table

__all__ = ["LogitAdjustedLoss", "adjust_logits", "logit_adjusted_loss"]

_AXES = ("(classes,)", "(groups, classes)")


def adjust_logits(logits: Tensor, class_counts: Tensor | Sequence[float], tau: float = 1.0) -> Tensor:
    r"""Return :math:`z - \tau \log \pi`: predict as if classes were balanced, with a model trained on plain logits.

    For a model trained with :func:`logit_adjusted_loss` take its plain logits: they are adjusted already.

    Args:
        logits: Unnormalised scores of a model trained with cross entropy.
        class_counts: Number of training samples of each class, or its share.
        tau: Strength, at least 0.

    Shape:
        - logits, output: ``(samples, classes)`` or ``(samples, classes, positions...)``
        - class_counts: ``(classes,)``

    Raises:
        ValueError: If a shape does not fit, ``tau`` is negative, or a count is negative or not finite, or all are zero.

    Example:
        >>> import torch
        >>> adjust_logits(torch.tensor([[1.0, 0.0]]), [90, 10]).argmax(dim=1)
        tensor([1])

    References:
        Menon et al., "Long-Tail Learning via Logit Adjustment", ICLR 2021 (post-hoc form).
    """
    shift = -in_range("tau", tau, 0) * log_prior(class_counts).to(logits.device)
    return logits + one_per_class("class_counts", shift, logits)


def logit_adjusted_loss(
    logits: Tensor,
    target: Tensor,
    *,
    adjustment: Tensor,
    class_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    group: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Compute cross entropy of logits to which a constant is added for each class, or each class of a group.

    .. math::
        \ell_n = -\log \operatorname{softmax}(z_n + a)_{y_n}, \qquad a_c = \tau \log \pi_c

    times the weights of class, group and sample. Use it first where rare classes are missed: the model has to beat the
    prior by itself, so its plain logits, by which to predict, stand for balanced classes; and unlike weights, the shift
    does not fade once the training data is fitted. Any other shift works too, such as minus a log weight, or the log
    frequency after a sampler. It costs what cross entropy costs; class probabilities and label smoothing cost one more
    pass over the logits.

    With one row a group, such as the source of a text, the shift is that of the sample's group:
    :math:`a_{g, c} = \tau \log p(c \mid g)`. To predict, the model needs no group.

    Args:
        logits: Unnormalised scores.
        target: Class indices, or class probabilities in the shape of ``logits``.
        adjustment: What to add to the logits of each class, or of each class in each group, such as ``tau *
            log_prior(class_counts)``; in nats.
        class_weight: Weight of each class, or of each class in each group; ``None`` means one.
        sample_weight: Weight of each sample, or of each sample and position; ``None`` means one.
        group: Group index of each sample, for an ``adjustment`` or a ``class_weight`` with one row per group.
        reduction: ``"mean"`` over what is not ignored, ``"sum"`` or ``"none"``.
        ignore_index: Class index that contributes neither loss nor count.
        label_smoothing: Share of the target that is spread evenly over all classes, from 0 to 1.

    Shape:
        - logits: ``(samples, classes)`` or ``(samples, classes, positions...)``
        - target: ``(samples, positions...)`` integer, or the shape of ``logits`` floating
        - adjustment: ``(classes,)`` or ``(groups, classes)``
        - class_weight: ``(classes,)`` or ``(groups, classes)``
        - sample_weight: ``(samples,)`` or ``(samples, positions...)``
        - group: ``(samples,)`` integer
        - output: scalar, or ``(samples, positions...)`` for ``reduction="none"``; in nats

    Raises:
        ValueError: If a shape does not fit, an argument is out of its range, ``adjustment`` or ``class_weight`` has
            rows for groups but ``group`` is missing, or (checked on the CPU only) an adjustment is not finite, or a
            class or group index is out of range.
        TypeError: If ``target`` or ``group`` has the wrong dtype.

    Example:
        >>> import torch
        >>> logits = torch.zeros(1, 2, requires_grad=True)
        >>> loss = logit_adjusted_loss(logits, torch.tensor([1]), adjustment=log_prior([90, 10]))
        >>> loss
        tensor(2.3026, grad_fn=<DivBackward0>)
        >>> loss.backward()
        >>> logits.grad
        tensor([[ 0.9000, -0.9000]])

    References:
        Menon et al., "Long-Tail Learning via Logit Adjustment", ICLR 2021.
        Ren et al., "Balanced Meta-Softmax for Long-Tailed Visual Recognition", NeurIPS 2020: ``tau=1``.
    """
    shift = shift_of_adjustment(adjustment, logits, group)
    common: dict[str, Any] = {
        "class_weight": class_weight,
        "sample_weight": sample_weight,
        "group": group,
        "reduction": reduction,
        "ignore_index": ignore_index,
    }
    check_tensor("target", target)
    if target.is_floating_point() or label_smoothing != 0:
        return classification_loss(logits + shift, target, label_smoothing=label_smoothing, **common)
    return shifted_classification_loss(logits, target, shift=shift, **common)


class LogitAdjustedLoss(ClassificationLoss):
    """Cross entropy of logits shifted by the log frequency of each class; see :func:`logit_adjusted_loss`.

    The shift lives in the buffer ``adjustment``, which :meth:`set_adjustment` changes in place, as
    :meth:`~ClassificationLoss.set_class_weight` does the buffer ``class_weight`` (ones); the state dict keeps both.
    Counts by group make one row a group: the loss then needs ``group=``. Class weights stay by class.

    Args:
        class_counts: Number of training samples of each class, or of each class in each group, or its share.
        tau: Strength, at least 0; 0 is cross entropy.
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
        >>> criterion = LogitAdjustedLoss([90, 10])
        >>> logits = torch.zeros(2, 2, requires_grad=True)
        >>> loss = criterion(logits, torch.tensor([0, 1]))
        >>> loss.backward()
        >>> loss
        tensor(1.2040, grad_fn=<DivBackward0>)
    """

    adjustment: Tensor

    def __init__(
        self,
        class_counts: Counts,
        tau: float = 1.0,
        *,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        ignore_index: int = -100,
    ) -> None:
        counts = checked_counts(class_counts)
        super().__init__(counts.shape[-1], reduction=reduction, ignore_index=ignore_index)
        self.class_counts: list[Any] = counts.tolist()
        self.tau = in_range("tau", tau, 0)
        self.label_smoothing = in_range("label_smoothing", label_smoothing, 0, 1)
        self.register_buffer("adjustment", tau * log_prior(counts))

    @torch.no_grad()
    def set_adjustment(self, values: Counts) -> None:
        """Replace what is added to the logits, in place, after checking it.

        Args:
            values: New shift of each class, or of each class in each group, in nats. A controller of margins sets
                :func:`log_prior` minus log weights.

        Shape:
            - values: that of the ``class_counts`` it was built with

        Raises:
            ValueError: If the shape does not fit, or a value is not finite.
        """
        new = torch.as_tensor(values, dtype=self.adjustment.dtype, device=self.adjustment.device)
        check_shape("values", new, self.adjustment.shape, _AXES[self.adjustment.dim() - 1])
        bad = ~torch.isfinite(new)
        if bool(bad.any()):
            raise ValueError(f"`values` must be finite, got {new[bad][0].item()}.")
        self.adjustment.copy_(new)

    def _loss(self, logits: Tensor, target: Tensor, **common: Any) -> Tensor:
        return logit_adjusted_loss(
            logits, target, adjustment=self.adjustment, label_smoothing=self.label_smoothing, **common
        )

    def _settings(self) -> list[str]:
        return [shown_table(self.class_counts), f"tau={self.tau}, label_smoothing={self.label_smoothing}"]
