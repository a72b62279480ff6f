"""Learn what a bias-only expert cannot explain: its prediction is multiplied in during training, and left out after."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from losses._checks import accumulation_dtype, check_shape
from losses.classification._base import ClassWeightedLoss, Weights
from losses.classification._per_sample import check_logits, classification_loss

__all__ = ["ProductOfExpertsLoss", "log_bias", "product_of_experts_loss"]

_LOWEST = -100.0  # as in F.binary_cross_entropy: an expert that is certain, and wrong, must not cost infinity


def product_of_experts_loss(
    logits: Tensor,
    target: Tensor,
    bias_logits: Tensor,
    *,
    class_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    group: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    r"""Compute cross entropy of the product of the model and of a fixed expert that sees the bias only.

    .. math::
        \ell_n = -\log \operatorname{softmax}(\log p_n + \log b_n)_{y_n}

    with :math:`p` the model and :math:`b` the expert, a model of the spurious features alone (the background, the
    hypothesis, the word list). Where the expert is right already there is little left to learn, so the model learns the
    rest. Predict with the model alone. No gradient reaches the expert: train it before, or beside by a loss of its own.
    Costs one log-softmax more than cross entropy.

    An even expert gives cross entropy; one that predicts the class shares gives the logit-adjusted loss. Where the bias
    is informative for good reasons too, the model unlearns those as well; :func:`learned_mixin_loss` is milder.

    Args:
        logits: Unnormalised scores of the model.
        target: Class indices, or class probabilities in the shape of ``logits``.
        bias_logits: Scores of the expert, logits or log-probabilities alike. Log-probabilities count down to -100.
        class_weight: Weight of each class, or of each class in each group; ``None`` means one.
        sample_weight: Weight of each sample, or of each sample and position; ``None`` means one.
        group: Group index of each sample, for a ``class_weight`` with one row per group.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        ignore_index: Class index that contributes neither loss nor count. Unused with class probabilities.

    Shape:
        - logits, bias_logits: ``(samples, classes, positions...)``
        - target: ``(samples, positions...)`` integer, or the shape of ``logits`` floating
        - class_weight: ``(classes,)`` or ``(groups, classes)``
        - sample_weight: ``(samples,)`` or ``(samples, positions...)``
        - group: ``(samples,)`` integer
        - output: scalar, or ``(samples, positions...)`` for ``reduction="none"``; in nats

    Raises:
        ValueError: If a shape does not fit, or (checked on the CPU only) a class or group index is out of range.
        TypeError: If an argument has the wrong type.

    Example:
        >>> import torch
        >>> logits = torch.zeros(2, 2, requires_grad=True)
        >>> expert = torch.tensor([[0.9, 0.1], [0.9, 0.1]]).log()
        >>> loss = product_of_experts_loss(logits, torch.tensor([0, 1]), expert, reduction="none")
        >>> loss
        tensor([0.1054, 2.3026], grad_fn=<...>)
        >>> loss.mean().backward()
        >>> logits.grad
        tensor([[-0.0500,  0.0500],
                [ 0.4500, -0.4500]])

    References:
        Hinton, "Training Products of Experts by Minimizing Contrastive Divergence", Neural Computation 14, 2002.
        Clark et al., "Don't Take the Easy Way Out: Ensemble Based Methods for Avoiding Known Dataset Biases", EMNLP
        2019 (bias product). He et al., "Unlearn Dataset Bias in Natural Language Inference by Fitting the Residual",
        DeepLo 2019 (the same loss, as a residual).
    """
    bias = log_bias(logits, bias_logits)
    return classification_loss(
        logits + bias,
        target,
        class_weight=class_weight,
        sample_weight=sample_weight,
        group=group,
        reduction=reduction,
        ignore_index=ignore_index,
    )


class ProductOfExpertsLoss(ClassWeightedLoss):
    """Train a model beside a fixed expert on the bias; see :func:`product_of_experts_loss`.

    Args:
        class_weight: Initial class weights, repeated for every group if given by class; ``None`` for a loss without.
            Pass ones if weights are to be set later.
        num_groups: Number of groups with class weights of their own; ``None`` keeps one weight per class.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        ignore_index: Class index that contributes neither loss nor count.

    Shape:
        - class_weight: ``(classes,)`` or ``(num_groups, classes)``
        - forward: as :func:`product_of_experts_loss`

    Raises:
        ValueError: If an argument is out of its range, or ``class_weight`` has the wrong shape or a negative or
            non-finite value.

    Example:
        >>> import torch
        >>> criterion = ProductOfExpertsLoss()
        >>> model, expert = torch.nn.Linear(5, 3), torch.nn.Linear(2, 3)
        >>> inputs = torch.randn(4, 5)
        >>> loss = criterion(model(inputs), torch.tensor([0, 1, 2, 0]), expert(inputs[:, :2]))
        >>> loss.backward()
        >>> expert.weight.grad is None
        True
    """

    def __init__(
        self,
        *,
        class_weight: Weights | None = None,
        num_groups: int | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
    ) -> None:
        super().__init__(None, class_weight, num_groups=num_groups, reduction=reduction, ignore_index=ignore_index)

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        bias_logits: Tensor,
        *,
        class_weight: Tensor | None = None,
        sample_weight: Tensor | None = None,
        group: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of the product; a ``class_weight`` given here replaces the buffer for this call."""
        common = self._common(class_weight, sample_weight, group)
        return product_of_experts_loss(logits, target, bias_logits, **common)

    def _settings(self) -> list[str]:
        return []


def log_bias(logits: Tensor, bias_logits: Tensor) -> Tensor:
    """Return the expert's log-probabilities, detached and at least -100, after checking their shape.

    Raises:
        ValueError: If a shape does not fit.
        TypeError: If ``bias_logits`` is no tensor.
    """
    check_logits(logits)
    check_shape("bias_logits", bias_logits, logits.shape, "of `logits`")
    scores = F.log_softmax(bias_logits.detach(), dim=1, dtype=accumulation_dtype(logits))
    return scores.clamp(min=_LOWEST)
