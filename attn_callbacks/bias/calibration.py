"""Whether confidence can be trusted, by class and by group: expected calibration error and mean loss."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from attn_callbacks._plain import plain
from attn_callbacks.bias._held import check_axes_of, hold
from attn_callbacks.bias.bootstrap import bootstrap_interval
from attn_callbacks.bias.rates import rate
from attn_callbacks.metrics.calibration import expected_calibration_error, mean_loss

__all__ = ["Calibration"]


@dataclass(frozen=True, eq=False)
class Calibration:
    """Confidence against accuracy in bins, and the loss, summed by group and target class.

    A calibrated model has an error of 0 in all and in each group. That of a target class is above 0 even then where
    the class is mistaken for others: it shows how sure the model is of its mistakes. Temperature scaling after training
    cures miscalibration, more reweighting makes it worse.

    Args:
        bins: In each bin of confidence: number of samples, sum of their confidences, number of right predictions.
        loss: Sum of the losses, and of their squares.

    Shape:
        - bins: ``(groups, classes, bins, 3)``
        - loss: ``(groups, classes, 2)``

    Raises:
        ValueError: If the shapes do not fit together.

    Example:
        >>> bins = torch.tensor([[[[10, 6.0, 6], [10, 9.0, 5]]]])
        >>> calibration = Calibration(bins, torch.tensor([[[12.0, 9.0]]]))
        >>> calibration.ece, calibration.mean_loss
        (0.2, 0.6)
    """

    bins: Tensor
    loss: Tensor

    def __post_init__(self) -> None:
        check_axes_of("bins", self.bins, ("groups", "classes", "bins", 3))
        check_axes_of("loss", self.loss, (*self.bins.shape[:2], 2))
        hold(self, "bins", torch.float64)
        hold(self, "loss", torch.float64)

    @cached_property
    def support(self) -> Tensor:
        """Number of samples, ``(groups, classes)``."""
        return self.bins[..., 0].sum(dim=2).round().long()

    @cached_property
    def ece(self) -> float:
        """Expected calibration error of all samples; NaN without any."""
        return float(expected_calibration_error(self.bins))

    @cached_property
    def class_ece(self) -> Tensor:
        """Expected calibration error of each target class, ``(classes,)``; NaN without samples."""
        return expected_calibration_error(self.bins, "class")

    @cached_property
    def group_ece(self) -> Tensor:
        """Expected calibration error of each group, ``(groups,)``; NaN without samples."""
        return expected_calibration_error(self.bins, "group")

    @cached_property
    def ece_interval(self) -> tuple[float, float]:
        """95 % interval of :attr:`ece`: bootstrap over bins and outcomes, confidences held at the mean of their bin."""
        count, confidence, hits = self.bins.sum(dim=(0, 1)).unbind(dim=-1)
        mean = rate(confidence, count).nan_to_num(nan=0.0)

        def redrawn(table: Tensor) -> Tensor:
            size = table.sum(dim=-1)  # (draws, bins)
            return (size * mean - table[..., 1]).abs().sum(dim=-1) / size.sum(dim=-1)

        return bootstrap_interval(torch.stack([count - hits, hits], dim=-1).round(), redrawn)

    @property
    def mean_loss(self) -> float:
        """Mean loss of all samples; NaN without any."""
        return float(mean_loss(self.bins, self.loss)[0])

    @property
    def class_loss(self) -> Tensor:
        """Mean loss of each class, ``(classes,)``."""
        return mean_loss(self.bins, self.loss, "class")[0]

    @property
    def class_loss_error(self) -> Tensor:
        """Standard error of :attr:`class_loss`, ``(classes,)``; NaN below two samples."""
        return mean_loss(self.bins, self.loss, "class")[1]

    @property
    def group_loss(self) -> Tensor:
        """Mean loss of each group, ``(groups,)``."""
        return mean_loss(self.bins, self.loss, "group")[0]

    @property
    def group_loss_error(self) -> Tensor:
        """Standard error of :attr:`group_loss`, ``(groups,)``; NaN below two samples."""
        return mean_loss(self.bins, self.loss, "group")[1]

    @property
    def cell_loss(self) -> Tensor:
        """Mean loss of each class within each group, ``(groups, classes)``."""
        return mean_loss(self.bins, self.loss, "cell")[0]

    def to_dict(self) -> dict[str, object]:
        """Return all figures as plain numbers and lists; NaN is ``None``."""
        names = ("support", "ece", "ece_interval", "class_ece", "group_ece", "mean_loss", "cell_loss")
        losses = ("class_loss", "class_loss_error", "group_loss", "group_loss_error")
        return {name: plain(getattr(self, name)) for name in (*names, *losses, "bins")}
