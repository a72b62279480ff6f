"""What the modules of all classification losses share: settings, class weights that may change, one forward."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from losses._checks import REDUCTIONS, at_least, check_weight_values, one_of
from losses._state import StatefulLoss

__all__ = ["ClassWeightedLoss", "ClassificationLoss", "Weights", "shown_counts"]

Weights = Tensor | Sequence[float] | Sequence[Sequence[float]]


class ClassWeightedLoss(StatefulLoss):
    """Settings and class weights of the classification losses; a subclass says in ``forward`` what it takes.

    Class weights live in the buffer ``class_weight``, which :meth:`set_class_weight` changes in place: a compiled step
    is not compiled again, and distributed copies stay valid. They are part of the state dict. A checkpoint without
    them, such as one of ``nn.CrossEntropyLoss()``, still loads: a warning says so, and the weights stay.

    Args:
        num_classes: Number of classes; ``None`` takes it from ``weight``, without which there are no class weights.
        weight: Initial weights; ``None`` means one everywhere. Weights by class are repeated for every group.
        num_groups: Number of groups with weights of their own; ``None`` keeps one weight per class.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        ignore_index: Class index that contributes neither loss nor count.

    Shape:
        - weight: ``(num_classes,)`` or ``(num_groups, num_classes)``

    Raises:
        ValueError: If a count is below one, or ``weight`` has the wrong shape or a negative or non-finite value.
    """

    class_weight: Tensor | None

    def __init__(
        self,
        num_classes: int | None,
        weight: Weights | None = None,
        *,
        num_groups: int | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        self.reduction = one_of("reduction", reduction, REDUCTIONS)
        self.ignore_index = ignore_index
        if num_classes is None and weight is not None:
            num_classes = _class_number(weight)
        self.num_classes = None if num_classes is None else at_least("num_classes", num_classes, 1)
        self.num_groups = None if num_groups is None else at_least("num_groups", num_groups, 1)
        self.register_buffer("class_weight", self._initial_weights())
        if weight is not None:
            self.set_class_weight(weight)

    @torch.no_grad()
    def set_class_weight(self, weight: Weights) -> None:
        """Replace the class weights in place, after checking them.

        Args:
            weight: New weights; weights by class are repeated for every group.

        Shape:
            - weight: ``(num_classes,)``, or ``(num_groups, num_classes)`` where the loss has groups

        Raises:
            ValueError: If the shape does not fit, or a weight is negative or not finite.
            RuntimeError: If the loss was built without class weights.
        """
        table = self.class_weight
        if table is None:
            raise RuntimeError(f"{type(self).__name__} was built without class weights: pass them when building it.")
        new = torch.as_tensor(weight, dtype=table.dtype, device=table.device)
        if tuple(new.shape) not in {table.shape[-1:], tuple(table.shape)}:
            raise ValueError(f"`weight` must have shape {tuple(table.shape)}, got {tuple(new.shape)}.")
        check_weight_values("weight", new)
        table.copy_(new)

    def extra_repr(self) -> str:
        """Show how to build the loss again, weights aside."""
        parts = self._settings()
        parts += [] if self.num_groups is None else [f"num_groups={self.num_groups}"]
        return ", ".join([*parts, f"reduction={self.reduction!r}", f"ignore_index={self.ignore_index}"])

    def _common(
        self, class_weight: Tensor | None, sample_weight: Tensor | None, group: Tensor | None
    ) -> dict[str, Any]:
        """Return what every loss function takes; a ``class_weight`` given here replaces the buffer."""
        return {
            "class_weight": self.class_weight if class_weight is None else class_weight,
            "sample_weight": sample_weight,
            "group": group,
            "reduction": self.reduction,
            "ignore_index": self.ignore_index,
        }

    def _settings(self) -> list[str]:
        return [] if self.num_classes is None else [str(self.num_classes)]

    def _initial_weights(self) -> Tensor | None:
        if self.num_classes is None:
            return None
        return torch.ones(self.num_classes if self.num_groups is None else (self.num_groups, self.num_classes))


class ClassificationLoss(ClassWeightedLoss, ABC):
    """Base of the losses of logits and targets: a subclass says in ``_loss`` which function it calls."""

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        *,
        class_weight: Tensor | None = None,
        sample_weight: Tensor | None = None,
        group: Tensor | None = None,
    ) -> Tensor:
        """Return the loss; a ``class_weight`` given here replaces the buffer for this call."""
        return self._loss(logits, target, **self._common(class_weight, sample_weight, group))

    @abstractmethod
    def _loss(self, logits: Tensor, target: Tensor, **common: Any) -> Tensor:
        """Return the loss by the function of the subclass."""


def _class_number(class_weight: Weights) -> int:
    """Return the number of classes that ``class_weight`` has weights for."""
    shape = torch.as_tensor(class_weight).shape
    if len(shape) not in (1, 2):
        raise ValueError(f"`class_weight` must have shape (classes,) or (groups, classes), got {tuple(shape)}.")
    return shape[-1]


def shown_counts(counts: Sequence[float]) -> str:
    """Return the counts of classes as a list to read, shortened where there are many classes."""
    shown = [f"{count:.15g}" for count in counts]
    return f"[{', '.join(shown if len(shown) <= 8 else [*shown[:7], '...'])}]"
