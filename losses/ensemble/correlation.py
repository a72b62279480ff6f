"""Negative correlation learning: members that are right together, each in its own way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from losses._checks import accumulation_dtype, in_range
from losses.classification._base import ClassificationLoss, Weights
from losses.classification._per_sample import classification_loss, reduce
from losses.ensemble._members import counted_targets, loss_weights, stack_members

__all__ = ["NegativeCorrelationLoss", "negative_correlation_loss"]


def negative_correlation_loss(
    logits: Tensor | Sequence[Tensor],
    target: Tensor,
    *,
    strength: float = 0.5,
    class_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    group: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    r"""Compute the members' mean cross entropy, less a reward for predictions that differ from the mean prediction.

    .. math::
        \ell_n = \frac{1}{M} \sum_i \left( -\log p_{i, n, y_n} - \lambda \lVert p_{i, n} - \bar p_n \rVert^2 \right),
        \qquad \bar p_n = \frac{1}{M} \sum_i p_{i, n}

    The reward is the ambiguity of the squared error: what the mean prediction gains on the mean member. It is at most
    :math:`1 - 1/M`, so the loss has a lower bound at any strength; strength 0 trains the members independently. Members
    have to be trained in one step, on the same samples. Costs one softmax more than the cross entropies.

    The gradient passes through :math:`\bar p`, and equals the one with :math:`\bar p` held constant, since deviations
    from a mean add up to zero. The paper differentiates its penalty with the other members' deviations held constant
    as well, which halves it: its :math:`\lambda`, often 0.2 to 0.9 and at most 1, is twice this one.

    Args:
        logits: Unnormalised scores of every member.
        target: Class indices, or class probabilities.
        strength: Weight :math:`\lambda` of the reward, not negative; often 0.1 to 0.45, and 0.5 is the paper's 1.
        class_weight: Weight of each class, or of each class in each group; ``None`` means one. Like the sample weights,
            it multiplies cross entropy and reward: weighing a sample by two is drawing it twice.
        sample_weight: Weight of each sample, or of each sample and position; ``None`` means one.
        group: Group index of each sample, for a ``class_weight`` with one row per group.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        ignore_index: Class index that contributes neither loss nor count. Unused with class probabilities.

    Shape:
        - logits: ``(members, samples, classes, positions...)``, or a sequence of ``(samples, classes, positions...)``
        - target: ``(samples, positions...)`` integer, or ``(samples, classes, positions...)`` floating
        - class_weight: ``(classes,)`` or ``(groups, classes)``
        - sample_weight: ``(samples,)`` or ``(samples, positions...)``
        - group: ``(samples,)`` integer
        - output: scalar, or ``(samples, positions...)`` for ``reduction="none"``

    Raises:
        ValueError: If there is no member, a shape does not fit, ``strength`` is negative, or (checked on the CPU only)
            a class or group index is out of range.
        TypeError: If an argument has the wrong type.

    Example:
        >>> logits = torch.tensor([[[2.0, 0.0]], [[0.0, 0.0]]], requires_grad=True)  # two members, one sample
        >>> target = torch.tensor([0])
        >>> negative_correlation_loss(logits, target, strength=0.0)
        tensor(0.4100, grad_fn=<DivBackward0>)
        >>> loss = negative_correlation_loss(logits, target)
        >>> loss
        tensor(0.3738, grad_fn=<DivBackward0>)
        >>> loss.backward()

    References:
        Liu and Yao, "Ensemble Learning via Negative Correlation", Neural Networks 12, 1999.
        Brown et al., "Managing Diversity in Regression Ensembles", JMLR 6, 2005 (ambiguity, bounds of the strength).
    """
    in_range("strength", strength, 0)
    members = stack_members(logits)
    common: dict[str, Any] = {
        "class_weight": class_weight,
        "sample_weight": sample_weight,
        "group": group,
        "ignore_index": ignore_index,
    }
    entropy = torch.stack([classification_loss(member, target, reduction="none", **common) for member in members])
    probabilities = F.softmax(members, dim=2, dtype=accumulation_dtype(members))
    spread = (probabilities - probabilities.mean(dim=0)).square().sum(dim=2).mean(dim=0)  # (samples, positions...)
    losses = entropy.mean(dim=0) - strength * loss_weights(members[0], target, **common) * spread
    return reduce(losses, None, counted_targets(target, ignore_index), reduction)


class NegativeCorrelationLoss(ClassificationLoss):
    """Train the members of an ensemble to differ where it helps; see :func:`negative_correlation_loss`.

    Args:
        strength: Weight of the reward for differing, not negative; often 0.1 to 0.45, and 0.5 is the paper's 1.
        class_weight: Initial class weights, repeated for every group if given by class; ``None`` for a loss without.
            Pass ones if weights are to be set later.
        num_groups: Number of groups with class weights of their own; ``None`` keeps one weight per class.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        ignore_index: Class index that contributes neither loss nor count.

    Shape:
        - class_weight: ``(classes,)`` or ``(num_groups, classes)``
        - forward: as :func:`negative_correlation_loss`

    Raises:
        ValueError: If an argument is out of its range, or ``class_weight`` has the wrong shape or a negative or
            non-finite value.
        TypeError: If ``strength`` is no number.

    Example:
        >>> criterion = NegativeCorrelationLoss(strength=0.2)
        >>> logits = torch.zeros(5, 8, 3, requires_grad=True)  # five members, eight samples
        >>> loss = criterion(logits, torch.zeros(8, dtype=torch.long))
        >>> loss.backward()
        >>> loss
        tensor(1.0986, grad_fn=<DivBackward0>)
    """

    def __init__(
        self,
        strength: float = 0.5,
        *,
        class_weight: Weights | None = None,
        num_groups: int | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
    ) -> None:
        super().__init__(None, class_weight, num_groups=num_groups, reduction=reduction, ignore_index=ignore_index)
        self.strength = in_range("strength", strength, 0)

    def _loss(self, logits: Tensor, target: Tensor, **common: Any) -> Tensor:
        return negative_correlation_loss(logits, target, strength=self.strength, **common)

    def _settings(self) -> list[str]:
        return [f"strength={self.strength}"]
