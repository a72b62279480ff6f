"""Confidence against hits, and the loss, per group and class: how far probabilities can be believed, and for whom."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from attn_callbacks._checks import at_least, one_of
from attn_callbacks.metrics.labels import LabelAccumulator, label_vector
from attn_callbacks.metrics.moments import mean_and_error

__all__ = ["CalibrationResult", "GroupCalibration", "expected_calibration_error", "mean_loss"]

_POOLED = {"cell": (), "class": (0,), "group": (1,), "all": (0, 1)}


class CalibrationResult(NamedTuple):
    """What `GroupCalibration` computes: sums, to be pooled and divided by the functions beside it.

    Args:
        bins: Number of samples, sum of their confidences, number of hits, ``(groups, classes, bins, 3)``, float64.
        loss: Sum of the losses and of their squares, ``(groups, classes, 2)``, float64.
    """

    bins: Tensor
    loss: Tensor


class GroupCalibration(LabelAccumulator):
    """Add up confidence, hits and cross-entropy per group and target class.

    A group keeps its number whether or not a batch holds it. The loss is the plain cross-entropy of the logits,
    whatever training minimises, so that figures of two runs can be compared. States hold
    ``groups * classes * (3 * bins + 2)`` numbers.

    Args:
        num_classes: Number of classes, at least 2.
        num_groups: Number of groups, at least 1.
        bins: Bins of equal width that confidences are sorted into. The lower edge belongs to a bin.

    Raises:
        ValueError: If a size is too small; in `update` if a shape does not fit or (on an accelerator in `compute`) a
            label is out of range.
        TypeError: In `update`, if labels are not whole numbers.

    Example:
        >>> metric = GroupCalibration(num_classes=2)
        >>> metric.update(torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1]))
        >>> bins, loss = metric.compute()
        >>> expected_calibration_error(bins)  # 88 % sure, half of them right
        tensor(0.3808, dtype=torch.float64)
        >>> expected_calibration_error(bins, by="class")
        tensor([0.1192, 0.8808], dtype=torch.float64)
        >>> mean_loss(bins, loss)
        (tensor(1.1269, dtype=torch.float64), tensor(1.0000, dtype=torch.float64))
    """

    bins: Tensor
    loss: Tensor

    def __init__(self, num_classes: int, num_groups: int = 1, bins: int = 15) -> None:
        super().__init__("target", "group")
        self.num_classes = at_least("num_classes", num_classes, 2)
        self.num_groups = at_least("num_groups", num_groups, 1)
        self.num_bins = at_least("bins", bins, 1)
        self.add_zeros("bins", num_groups, num_classes, bins, 3)
        self.add_zeros("loss", num_groups, num_classes, 2)

    def update(self, logits: Tensor, target: Tensor, group: Tensor | None = None) -> None:
        """Add one batch.

        Args:
            logits: Scores before the softmax, ``(samples, classes)``; classes that the model lacks at the end may be
                missing. ``(samples,)`` or ``(samples, 1)``: one score for class 1 against class 0.
            target: Right class of each sample, ``(samples,)``. Samples with a negative target are left out, and those
                whose loss is not finite.
            group: Group of each sample, ``(samples,)``; ``None`` puts all in group 0. Samples with a negative group,
                one that is not known, are left out.
        """
        scores = self._log_probabilities(logits)
        samples = len(scores)
        target = label_vector("target", target, samples)
        group = torch.zeros_like(target) if group is None else label_vector("group", group, samples)
        loss = -scores.gather(1, target.clamp(0, self.num_classes - 1)[:, None])[:, 0]
        counted = self.within(torch.stack([target, group]), (target >= 0) & (group >= 0) & loss.isfinite())
        best, predicted = scores.max(dim=1)
        confidence = best.exp()
        cell = (group * self.num_classes + target).where(counted, 0)
        index = (cell * self.num_bins + self._bin(confidence)).where(counted, 0)
        values = torch.stack([torch.ones_like(loss), confidence, (predicted == target).double()], dim=1)
        self.writable("bins").view(-1, 3).index_add_(0, index, values.where(counted[:, None], 0.0))
        losses = torch.stack([loss, loss**2], dim=1).where(counted[:, None], 0.0)
        self.writable("loss").view(-1, 2).index_add_(0, cell, losses)

    def compute(self) -> CalibrationResult:
        """Return the sums of every group and class."""
        self.check_labels()
        return CalibrationResult(self.bins, self.loss)

    def label_limits(self) -> tuple[int, ...]:
        """Return the number of classes and groups."""
        return self.num_classes, self.num_groups

    def _log_probabilities(self, logits: Tensor) -> Tensor:
        """Return log-probabilities in float64, ``(samples, classes)``."""
        scores = logits.detach().double()
        if scores.dim() == 1 or (scores.dim() == 2 and scores.shape[1] == 1):
            score = scores.reshape(-1)
            scores = torch.stack([torch.zeros_like(score), score], dim=1)
        if scores.dim() != 2 or scores.shape[1] > self.num_classes:
            raise ValueError(
                f"`logits` must have shape (samples, classes) with at most {self.num_classes} classes, got "
                f"{tuple(logits.shape)}."
            )
        return F.pad(scores, (0, self.num_classes - scores.shape[1]), value=-torch.inf).log_softmax(dim=1)

    def _bin(self, confidence: Tensor) -> Tensor:
        edges = torch.linspace(0.0, 1.0, self.num_bins + 1, dtype=torch.float64, device=confidence.device)
        return torch.bucketize(confidence, edges[1:-1], right=True)


def expected_calibration_error(bins: Tensor, by: str = "all") -> Tensor:
    r"""Average how far confidence and accuracy lie apart over the bins of confidence, weighted by their samples.

    .. math:: \sum_b \frac{n_b}{n} \left| \frac{hits_b}{n_b} - \frac{confidence_b}{n_b} \right|

    Few samples a bin make it larger than it is. The classes are those of the *targets*: what is 0 for a calibrated
    model is the overall figure and that of a group, whereas a class that is often mistaken for others shows here how
    sure the model is of its mistakes.

    Args:
        bins: `CalibrationResult.bins`, or the sum of several.
        by: ``"cell"`` (class within group), ``"class"``, ``"group"`` or ``"all"``.

    Shape:
        - bins: ``(groups, classes, bins, 3)``
        - output: ``(groups, classes)``, ``(classes,)``, ``(groups,)`` or ``()``, NaN without a sample

    Raises:
        ValueError: If ``by`` is none of them.

    Example:
        >>> bins = torch.tensor([[[[10.0, 9.0, 5.0]], [[10.0, 9.0, 9.0]]]])  # one group, two classes, one bin
        >>> expected_calibration_error(bins), expected_calibration_error(bins, by="class")
        (tensor(0.2000), tensor([0.4000, 0.0000]))

    References:
        Guo et al., "On Calibration of Modern Neural Networks", 2017, equation 3.
    """
    count, confidence, hits = _pooled(bins, by).unbind(dim=-1)
    return (hits - confidence).abs().sum(dim=-1) / count.sum(dim=-1)


def mean_loss(bins: Tensor, loss: Tensor, by: str = "all") -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy in nats and its standard error.

    Args:
        bins: `CalibrationResult.bins`: the numbers of samples.
        loss: `CalibrationResult.loss`.
        by: ``"cell"`` (class within group), ``"class"``, ``"group"`` or ``"all"``.

    Shape:
        - bins: ``(groups, classes, bins, 3)``
        - loss: ``(groups, classes, 2)``
        - output: two of ``(groups, classes)``, ``(classes,)``, ``(groups,)`` or ``()``; the mean is NaN without a
          sample, its error below two

    Raises:
        ValueError: If ``by`` is none of them.
    """
    count = _pooled(bins, by)[..., 0].sum(dim=-1)
    return mean_and_error(count, *_pooled(loss, by).unbind(dim=-1))


def _pooled(sums: Tensor, by: str) -> Tensor:
    axes = _POOLED[one_of("by", by, _POOLED)]
    return sums.sum(dim=axes) if axes else sums  # a sum over no axes would be one over all
