"""Conditional value at risk: the mean over the worst share of the samples, groups unknown."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from losses._checks import REDUCTIONS, in_range, one_of
from losses.classification._base import ClassificationLoss, Weights
from losses.groups._per_group import sample_losses

__all__ = ["CVaRLoss", "cvar_loss"]


def cvar_loss(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.1,
    class_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    group: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    r"""Average the cross entropy of the worst share ``alpha`` of the samples.

    .. math::
        L = \min_\eta \; \eta + \frac{1}{\alpha N} \sum_n \max(0, \ell_n - \eta)
        = \frac{1}{\alpha N} \sum_{i=1}^{N} \min(1, \max(0, \alpha N - i + 1)) \; \ell_{(i)}

    with losses sorted from the worst on, so the sample at the boundary counts by the fraction that is left. ``alpha=1``
    is the mean, ``alpha`` of at most ``1 / N`` the maximum. No group labels are needed, but what is worst may as well
    be an outlier or a wrong label: CVaR chases them, so prefer a loss over groups where groups are known. On a
    mini-batch it lies, in expectation, below that of the data set: keep ``alpha`` times the batch size well above one.
    One sort of the batch's losses beyond cross entropy. Each process takes the worst of its own batch.

    Args:
        logits: Unnormalised scores.
        target: Class indices, or class probabilities in the shape of ``logits``.
        alpha: Share of the samples to average, above 0 and at most 1.
        class_weight: Weight of each class, or of each class in each group; ``None`` means one.
        sample_weight: Weight of each sample, or of each sample and position; ``None`` means one. Weights multiply the
            losses before the worst are picked; the share stays one of the number of samples.
        group: Group index of each sample. Picks the row of a ``class_weight`` with one row per group, else unused.
        reduction: ``"mean"`` is the loss above, ``"none"`` the samples' values whose mean it is, ``"sum"`` their sum.
            The mean is over the samples that count.
        ignore_index: Class index that contributes neither loss nor count. A sample's loss is the mean over its
            positions that count. Unused with class probabilities.

    Shape:
        - logits: ``(samples, classes)`` or ``(samples, classes, positions...)``
        - target: ``(samples, positions...)`` integer, or the shape of ``logits`` floating
        - class_weight: ``(classes,)`` or ``(groups, classes)``
        - sample_weight: ``(samples,)`` or ``(samples, positions...)``
        - group: ``(samples,)`` integer
        - output: scalar, or ``(samples,)`` for ``reduction="none"``; in nats

    Raises:
        ValueError: If ``alpha`` is out of its range, a shape does not fit, or (checked on the CPU only) an index is out
            of range.
        TypeError: If ``target`` or ``group`` has the wrong dtype.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 2.0]], requires_grad=True)
        >>> loss = cvar_loss(logits, torch.tensor([0, 0, 0]), alpha=0.5)
        >>> loss
        tensor(1.5224, grad_fn=<DivBackward0>)
        >>> loss.backward()
        >>> logits.grad.abs()
        tensor([[0.0000, 0.0000],
                [0.0896, 0.0896],
                [0.5872, 0.5872]])

    References:
        Rockafellar and Uryasev, "Optimization of Conditional Value-at-Risk", Journal of Risk 2000.
        Levy et al., "Large-Scale Methods for Distributionally Robust Optimization", NeurIPS 2020 (mini-batches).
    """
    one_of("reduction", reduction, REDUCTIONS)
    in_range("alpha", alpha, 0, 1, above=True)
    losses, counted = sample_losses(
        logits, target, class_weight=class_weight, sample_weight=sample_weight, group=group, ignore_index=ignore_index
    )
    weight, worst = _worst_weights(losses, counted, alpha)
    losses = losses * weight
    if reduction == "mean":
        return losses.sum() / worst
    losses = losses * (counted.sum() / worst)
    return losses.sum() if reduction == "sum" else losses


class CVaRLoss(ClassificationLoss):
    """Average the loss of the worst share of the samples; see :func:`cvar_loss`.

    Args:
        alpha: Share of the samples to average, above 0 and at most 1.
        class_weight: Initial class weights; ``None`` for a loss without. Weights by class are repeated for every group.
        num_groups: Number of groups with class weights of their own; ``None`` keeps one weight per class.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        ignore_index: Class index that contributes neither loss nor count.

    Shape:
        - class_weight: ``(classes,)`` or ``(num_groups, classes)``
        - forward: as :func:`cvar_loss`

    Raises:
        ValueError: If an argument is out of its range or has the wrong shape.

    Example:
        >>> import torch
        >>> criterion = CVaRLoss(alpha=0.5)
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]], requires_grad=True)
        >>> loss = criterion(logits, torch.tensor([0, 0]))
        >>> loss.backward()
        >>> loss
        tensor(2.1269, grad_fn=<DivBackward0>)
    """

    def __init__(
        self,
        alpha: float = 0.1,
        *,
        class_weight: Weights | None = None,
        num_groups: int | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
    ) -> None:
        super().__init__(None, class_weight, num_groups=num_groups, reduction=reduction, ignore_index=ignore_index)
        self.alpha = in_range("alpha", alpha, 0, 1, above=True)

    def _loss(self, logits: Tensor, target: Tensor, **common: Any) -> Tensor:
        return cvar_loss(logits, target, alpha=self.alpha, **common)

    def _settings(self) -> list[str]:
        return [f"alpha={self.alpha}"]


def _worst_weights(losses: Tensor, counted: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Return how much of each sample is in the worst share, ``(samples,)``, and the number of samples in it."""
    worst = alpha * counted.sum().to(losses.dtype)
    order = torch.where(counted, losses, -torch.inf).argsort(descending=True, stable=True)
    rank = torch.arange(len(losses), dtype=losses.dtype, device=losses.device)
    weight = torch.zeros_like(losses).scatter(0, order, (worst - rank).clamp(0, 1))
    return weight, worst.clamp(min=torch.finfo(losses.dtype).tiny)
