"""A product with a bias-only expert in which the model decides, sample by sample, how far to trust the expert."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losses._checks import at_least, check_shape, check_within, in_range
from losses._state import allow_missing_state
from losses.classification._base import ClassWeightedLoss, Weights
from losses.classification._per_sample import classification_loss, reduce
from losses.ensemble._members import counted_targets, loss_weights
from losses.ensemble.experts import log_bias

__all__ = ["LearnedMixinLoss", "learned_mixin_loss"]


def learned_mixin_loss(
    logits: Tensor,
    target: Tensor,
    bias_logits: Tensor,
    gate: Tensor,
    *,
    entropy_penalty: float = 0.03,
    class_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    group: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    r"""Compute cross entropy of the model times a gated expert, plus the entropy of the gated expert.

    .. math::
        \ell_n = -\log \operatorname{softmax}(\log p_n + g_n \log b_n)_{y_n}
            + w \, H\!\left( \operatorname{softmax}(g_n \log b_n) \right)

    The gate :math:`g \ge 0` says how far the expert :math:`b` is to be trusted: 0 gives cross entropy, 1 the product of
    :func:`product_of_experts_loss`. Without the penalty the gate may close, and the model learns the bias after all;
    since an even prediction has the highest entropy, the penalty keeps it open. Predict with the model alone.

    Args:
        logits: Unnormalised scores of the model.
        target: Class indices, or class probabilities in the shape of ``logits``.
        bias_logits: Scores of the expert, logits or log-probabilities alike; detached. Log-probabilities count down to
            -100.
        gate: Trust :math:`g` in the expert, not negative, such as a softplus of the model's features.
        entropy_penalty: Weight :math:`w` of the entropy, not negative. The paper picks it for each data set.
        class_weight: Weight of each class, or of each class in each group; ``None`` means one. Like the sample weights,
            it multiplies the penalty too.
        sample_weight: Weight of each sample, or of each sample and position; ``None`` means one.
        group: Group index of each sample, for a ``class_weight`` with one row per group.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        ignore_index: Class index that contributes neither loss nor count. Unused with class probabilities.

    Shape:
        - logits, bias_logits: ``(samples, classes, positions...)``
        - target: ``(samples, positions...)`` integer, or the shape of ``logits`` floating
        - gate: ``(samples, positions...)``
        - class_weight: ``(classes,)`` or ``(groups, classes)``
        - sample_weight: ``(samples,)`` or ``(samples, positions...)``
        - group: ``(samples,)`` integer
        - output: scalar, or ``(samples, positions...)`` for ``reduction="none"``; in nats

    Raises:
        ValueError: If a shape does not fit, ``entropy_penalty`` is negative, or (checked on the CPU only) a gate is
            negative or an index out of range.
        TypeError: If an argument has the wrong type.

    Example:
        >>> logits, gate = torch.zeros(1, 2, requires_grad=True), torch.tensor([1.0], requires_grad=True)
        >>> expert = torch.tensor([[0.1, 0.9]]).log()
        >>> loss = learned_mixin_loss(logits, torch.tensor([0]), expert, gate)
        >>> loss
        tensor(2.3123, grad_fn=<DivBackward0>)
        >>> loss.backward()
        >>> gate.grad > 0  # the expert is wrong here: trust it less
        tensor([True])

    References:
        Clark et al., "Don't Take the Easy Way Out: Ensemble Based Methods for Avoiding Known Dataset Biases", EMNLP
        2019 (learned-mixin, and learned-mixin with the entropy penalty).
    """
    in_range("entropy_penalty", entropy_penalty, 0)
    common: dict[str, Any] = {
        "class_weight": class_weight,
        "sample_weight": sample_weight,
        "group": group,
        "ignore_index": ignore_index,
    }
    bias = log_bias(logits, bias_logits)
    check_shape("gate", gate, (logits.shape[0], *logits.shape[2:]), "(samples, positions...)")
    check_within("gate", gate.detach(), 0, torch.finfo(gate.dtype).max)
    trusted = gate.to(bias.dtype).unsqueeze(1) * bias
    losses = classification_loss(logits + trusted, target, reduction="none", **common)
    scores = F.log_softmax(trusted, dim=1)
    entropy = -(scores.exp() * scores).sum(dim=1)
    losses = losses + entropy_penalty * loss_weights(logits, target, **common) * entropy
    return reduce(losses, None, counted_targets(target, ignore_index), reduction)


class LearnedMixinLoss(ClassWeightedLoss):
    r"""Train a model beside an expert on the bias that it learns when to trust; see :func:`learned_mixin_loss`.

    The gate is :math:`\operatorname{softplus}(w^\top h + c)` of the model's features :math:`h`, which it trains too.
    Its parameters belong to this module: give them to the optimiser. A checkpoint of a criterion without state still
    loads: a warning says so, and the gate stays as it is.

    Args:
        hidden_size: Number of features :math:`h`, those that the model's last layer sees.
        entropy_penalty: Weight of the gated expert's entropy, not negative.
        class_weight: Initial class weights, repeated for every group if given by class; ``None`` for a loss without.
            Pass ones if weights are to be set later.
        num_groups: Number of groups with class weights of their own; ``None`` keeps one weight per class.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        ignore_index: Class index that contributes neither loss nor count.

    Shape:
        - class_weight: ``(classes,)`` or ``(num_groups, classes)``
        - hidden, in forward: ``(samples, positions..., hidden_size)``
        - forward: as :func:`learned_mixin_loss` besides

    Raises:
        ValueError: If an argument is out of its range, or ``class_weight`` has the wrong shape or a negative or
            non-finite value.
        TypeError: If ``hidden_size`` or ``entropy_penalty`` is no number.

    Example:
        >>> criterion = LearnedMixinLoss(hidden_size=5)
        >>> head, hidden, expert = torch.nn.Linear(5, 3), torch.randn(4, 5), torch.randn(4, 3)
        >>> optimizer = torch.optim.SGD([*head.parameters(), *criterion.parameters()], lr=0.1)
        >>> loss = criterion(head(hidden), torch.tensor([0, 1, 2, 0]), expert, hidden)
        >>> loss.backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        hidden_size: int,
        entropy_penalty: float = 0.03,
        *,
        class_weight: Weights | None = None,
        num_groups: int | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
    ) -> None:
        super().__init__(None, class_weight, num_groups=num_groups, reduction=reduction, ignore_index=ignore_index)
        self.hidden_size = at_least("hidden_size", hidden_size, 1)
        self.entropy_penalty = in_range("entropy_penalty", entropy_penalty, 0)
        self.gate = nn.Linear(hidden_size, 1)
        allow_missing_state(self.gate)

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        bias_logits: Tensor,
        hidden: Tensor,
        *,
        class_weight: Tensor | None = None,
        sample_weight: Tensor | None = None,
        group: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of the gated product; a ``class_weight`` given here replaces the buffer for this call."""
        common = self._common(class_weight, sample_weight, group)
        return learned_mixin_loss(
            logits, target, bias_logits, self._trust(hidden), entropy_penalty=self.entropy_penalty, **common
        )

    def _trust(self, hidden: Tensor) -> Tensor:
        """Return the gate of each sample (and position), in the precision of the gate's parameters."""
        check_shape("hidden", hidden, (*hidden.shape[:-1], self.hidden_size), "(samples, positions..., hidden_size)")
        with torch.autocast(hidden.device.type, enabled=False):
            return F.softplus(self.gate(hidden.to(self.gate.weight.dtype)).squeeze(-1))

    def _settings(self) -> list[str]:
        return [str(self.hidden_size), f"entropy_penalty={self.entropy_penalty}"]
