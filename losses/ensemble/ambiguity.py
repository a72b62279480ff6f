"""What an ensemble gains on its members: the ambiguity decomposition of the cross entropy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from losses.classification._per_sample import classification_loss
from losses.ensemble._members import mean_log_probabilities, stack_members

__all__ = ["AmbiguityDecomposition", "ambiguity_decomposition"]


class AmbiguityDecomposition(NamedTuple):
    """Ensemble loss, as mean loss of the members less their ambiguity.

    Args:
        member_loss: Mean over members of their cross entropy.
        ensemble_loss: Cross entropy of the mean probabilities.
        ambiguity: The first less the second, never negative but for rounding.
    """

    member_loss: Tensor
    ensemble_loss: Tensor
    ambiguity: Tensor


def ambiguity_decomposition(
    logits: Tensor | Sequence[Tensor],
    target: Tensor,
    *,
    class_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    group: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> AmbiguityDecomposition:
    r"""Split the cross entropy of the members' mean probabilities into their own loss and their ambiguity.

    .. math::
        \underbrace{-\log \bar p_y}_{\text{ensemble}} =
        \underbrace{-\tfrac{1}{M} \sum_i \log p_{i, y}}_{\text{members}} -
        \underbrace{\left( \log \bar p_y - \tfrac{1}{M} \sum_i \log p_{i, y} \right)}_{\text{ambiguity}}

    The ambiguity is not negative (Jensen): the ensemble is never worse than its mean member, and the ambiguity says by
    how much it is better. It is a gain only next to the members' loss, so look at both. Unlike the ambiguity of the
    squared error, this one depends on the target. Differentiable. Costs one log-softmax over all members.

    Args:
        logits: Unnormalised scores of every member.
        target: Class indices, or class probabilities.
        class_weight: Weight of each class, or of each class in each group; ``None`` means one.
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
        - output: scalars, or ``(samples, positions...)`` for ``reduction="none"``; in nats

    Raises:
        ValueError: If there is no member, a shape does not fit, or (checked on the CPU only) an index is out of range.
        TypeError: If an argument has the wrong type.

    Example:
        >>> logits = torch.tensor([[[0.9, 0.1]], [[0.1, 0.9]]]).log().requires_grad_()
        >>> parts = ambiguity_decomposition(logits, torch.tensor([0]))
        >>> parts.member_loss.item(), parts.ensemble_loss.item(), parts.ambiguity.item()
        (1.2040, 0.6931, 0.5108)
        >>> parts.ensemble_loss.backward()

    References:
        Krogh and Vedelsby, "Neural Network Ensembles, Cross Validation, and Active Learning", NeurIPS 1995 (squared
        error). Wood et al., "A Unified Theory of Diversity in Ensemble Learning", JMLR 24, 2023 (other losses).
    """
    members = stack_members(logits)

    def entropy(scores: Tensor) -> Tensor:
        return classification_loss(
            scores,
            target,
            class_weight=class_weight,
            sample_weight=sample_weight,
            group=group,
            reduction=reduction,
            ignore_index=ignore_index,
        )

    member_loss = torch.stack([entropy(member) for member in members]).mean(dim=0)
    ensemble_loss = entropy(mean_log_probabilities(members))
    return AmbiguityDecomposition(member_loss, ensemble_loss, member_loss - ensemble_loss)
