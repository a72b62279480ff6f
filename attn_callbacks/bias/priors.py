"""How the shares of the classes shift between training, validation and predictions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attn_callbacks._plain import plain
from attn_callbacks.bias._held import check_axes_of, hold

__all__ = ["PriorShift"]


@dataclass(frozen=True, eq=False)
class PriorShift:
    """Class shares in training, in the validation labels and in the predictions, and the distances between them.

    Distances are total variations: the share of samples that would have to change class. Predictions further from the
    labels than training is from them follow the training prior.

    Args:
        training: Share of each class in what training was fed; NaN where that is not known.
        label: Share of each class among the targets.
        prediction: Share of each class among the predictions.

    Shape:
        - training, label, prediction: ``(classes,)``

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> shift = PriorShift(torch.tensor([0.9, 0.1]), torch.tensor([0.5, 0.5]), torch.tensor([0.7, 0.3]))
        >>> shift.label_distance, shift.prediction_distance, shift.excess_distance
        (0.4, 0.2, 0.2)
    """

    training: Tensor
    label: Tensor
    prediction: Tensor

    def __post_init__(self) -> None:
        for name in ("training", "label", "prediction"):
            check_axes_of(name, getattr(self, name), self.label.shape if self.label.ndim == 1 else ("classes",))
            hold(self, name, torch.float64)

    @property
    def label_shift(self) -> Tensor:
        """``label - training``, ``(classes,)``."""
        return self.label - self.training

    @property
    def prediction_shift(self) -> Tensor:
        """``prediction - training``, ``(classes,)``."""
        return self.prediction - self.training

    @property
    def excess(self) -> Tensor:
        """``prediction - label``, ``(classes,)``: below 0 for a class that is predicted too seldom."""
        return self.prediction - self.label

    @property
    def label_distance(self) -> float:
        """Distance between training and labels."""
        return _distance(self.label_shift)

    @property
    def prediction_distance(self) -> float:
        """Distance between training and predictions."""
        return _distance(self.prediction_shift)

    @property
    def excess_distance(self) -> float:
        """Distance between labels and predictions."""
        return _distance(self.excess)

    def to_dict(self) -> dict[str, object]:
        """Return priors, shifts and distances as plain numbers and lists; NaN is ``None``."""
        shifts = ("label_shift", "prediction_shift", "excess")
        distances = ("label_distance", "prediction_distance", "excess_distance")
        return {name: plain(getattr(self, name)) for name in ("training", "label", "prediction", *shifts, *distances)}


def _distance(shift: Tensor) -> float:
    return float(shift.abs().sum() / 2)
