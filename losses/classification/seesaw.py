"""Seesaw loss: rare classes are pushed down less by frequent ones, unless the model confuses the two."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from losses._checks import accumulation_dtype, check_shape, check_within, in_range
from losses._distributed import sum_over_processes
from losses.classification._base import ClassificationLoss
from losses.classification._per_sample import check_class_indices, check_logits
from losses.classification._shifted import shifted_classification_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["SeesawLoss", "seesaw_loss"]


def seesaw_loss(
    logits: Tensor,
    target: Tensor,
    *,
    class_counts: Tensor | Sequence[float],
    p: float = 0.8,
    q: float = 2.0,
    eps: float = 0.01,
    class_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    group: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    r"""Compute cross entropy in which each other class counts by how frequent and how confused with the target it is.

    .. math::
        \ell_n = -\log \frac{e^{z_i}}{e^{z_i} + \sum_{j \ne i} M_{ij} C_{ij} e^{z_j}}, \quad i = y_n, \\
        M_{ij} = \min\Bigl(1, \frac{N_j}{N_i}\Bigr)^p, \qquad
        C_{ij} = \max\Bigl(1, \frac{\sigma_j}{\max(\sigma_i, \epsilon)}\Bigr)^q

    times the weights of class, group and sample, with :math:`\sigma` the softmax of the logits, without a gradient.
    ``M`` mitigates the push that samples of a frequent class give a rarer one; ``C`` compensates where a sample is
    taken for that class. Use it with hundreds of classes, and where counts are only known as training goes on; a class
    that was not seen counts as seen once. At ``p=0, q=0`` it is :func:`weighted_cross_entropy`.

    It costs a second softmax and a few passes over the logits.

    Args:
        logits: Unnormalised scores.
        target: Class indices; class probabilities have no class of their own to compare with.
        class_counts: Number of samples of each class so far.
        p: Strength of the mitigation, at least 0.
        q: Strength of the compensation, at least 0.
        eps: Least probability of the target in the compensation, above 0 and at most 1.
        class_weight: Weight of each class, or of each class in each group; ``None`` means one.
        sample_weight: Weight of each sample, or of each sample and position; ``None`` means one.
        group: Group index of each sample, for a ``class_weight`` with one row per group.
        reduction: ``"mean"`` over what is not ignored, ``"sum"`` or ``"none"``.
        ignore_index: Class index that contributes neither loss nor count.

    Shape:
        - logits: ``(samples, classes)`` or ``(samples, classes, positions...)``
        - target: ``(samples, positions...)`` integer
        - class_counts: ``(classes,)``
        - class_weight: ``(classes,)`` or ``(groups, classes)``
        - sample_weight: ``(samples,)`` or ``(samples, positions...)``
        - group: ``(samples,)`` integer
        - output: scalar, or ``(samples, positions...)`` for ``reduction="none"``; in nats

    Raises:
        ValueError: If a shape does not fit, an argument is out of its range, ``class_weight`` has rows for groups but
            ``group`` is missing, or (checked on the CPU only) a count is negative or not finite, or a class or group
            index is out of range.
        TypeError: If ``target`` or ``group`` does not hold integers.

    Example:
        >>> import torch
        >>> logits, counts = torch.zeros(1, 2, requires_grad=True), torch.tensor([100, 1])
        >>> loss = seesaw_loss(logits, torch.tensor([0]), class_counts=counts)
        >>> loss  # less than log(2): the other class is rare
        tensor(0.0248, grad_fn=<DivBackward0>)
        >>> loss.backward()
        >>> logits.grad
        tensor([[-0.0245,  0.0245]])

    References:
        Wang et al., "Seesaw Loss for Long-Tailed Instance Segmentation", CVPR 2021.
    """
    in_range("p", p, 0)
    in_range("q", q, 0)
    in_range("eps", eps, 0, 1, above=True)
    check_logits(logits)
    counts = torch.as_tensor(class_counts, device=logits.device)
    check_shape("class_counts", counts, logits.shape[1:2], "(classes,)")
    check_within("class_counts", counts, 0, torch.finfo(torch.float32).max, advice="Count the training labels.")
    target = check_class_indices(logits, target, ignore_index)
    index = torch.where(target != ignore_index, target, 0).unsqueeze(1)
    return shifted_classification_loss(
        logits,
        target,
        shift=_log_factors(logits, index, counts, p, q, eps),
        class_weight=class_weight,
        sample_weight=sample_weight,
        group=group,
        reduction=reduction,
        ignore_index=ignore_index,
    )


class SeesawLoss(ClassificationLoss):
    """Cross entropy that mitigates and compensates between classes as it counts them; see :func:`seesaw_loss`.

    In training mode, with gradients on, each call first adds its targets, of all processes, to the buffer
    ``class_counts``, which the state dict keeps; every process has to call the loss then. Ignored targets are not
    counted. Keep the loss outside activation checkpointing: a forward pass that runs again would count again.

    Args:
        num_classes: Number of classes.
        p: Strength of the mitigation, at least 0.
        q: Strength of the compensation, at least 0.
        eps: Least probability of the target in the compensation, above 0 and at most 1.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        ignore_index: Class index that contributes neither loss nor count.
        process_group: Processes whose targets are counted together; ``None`` means all, once torch.distributed is
            initialised.

    Shape:
        - forward: as :func:`seesaw_loss`

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> criterion = SeesawLoss(3)
        >>> logits = torch.zeros(4, 3, requires_grad=True)
        >>> criterion(logits, torch.tensor([0, 0, 0, 2])).backward()
        >>> criterion.class_counts
        tensor([3, 0, 1])
    """

    class_counts: Tensor

    def __init__(
        self,
        num_classes: int,
        p: float = 0.8,
        q: float = 2.0,
        *,
        eps: float = 0.01,
        reduction: str = "mean",
        ignore_index: int = -100,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(num_classes, reduction=reduction, ignore_index=ignore_index)
        self.p = in_range("p", p, 0)
        self.q = in_range("q", q, 0)
        self.eps = in_range("eps", eps, 0, 1, above=True)
        self.process_group = process_group
        counts = torch.zeros(num_classes, dtype=torch.int64)  # float32 would stop to count at 2 ** 24
        self.register_buffer("class_counts", counts)

    def _loss(self, logits: Tensor, target: Tensor, **common: Any) -> Tensor:
        if self.learning:
            self._count(logits, target)
        return seesaw_loss(logits, target, class_counts=self.class_counts, p=self.p, q=self.q, eps=self.eps, **common)

    @torch.no_grad()
    def _count(self, logits: Tensor, target: Tensor) -> None:
        check_logits(logits)
        check_shape("class_counts", self.class_counts, logits.shape[1:2], "(classes,)")
        target = check_class_indices(logits, target, self.ignore_index)
        counted = target != self.ignore_index
        index = torch.where(counted, target, 0).flatten()
        batch = torch.zeros_like(self.class_counts).scatter_add_(0, index, counted.flatten().long())
        self.class_counts.add_(sum_over_processes(batch, self.process_group))

    def _settings(self) -> list[str]:
        return [f"{self.num_classes}, p={self.p}, q={self.q}, eps={self.eps}"]


@torch.no_grad()
def _log_factors(logits: Tensor, index: Tensor, class_counts: Tensor, p: float, q: float, eps: float) -> Tensor:
    """Return the log of mitigation times compensation in the shape of ``logits``; zero for the target itself."""
    dtype = accumulation_dtype(logits)
    counts = class_counts.to(dtype).clamp(min=1).log()
    counts_of_others = counts.reshape(-1, *[1] * (logits.dim() - 2))  # (classes, 1...)
    mitigation = (counts_of_others - counts[index]).clamp_(max=0).mul_(p)
    scores = F.log_softmax(logits, dim=1, dtype=dtype)
    own = scores.gather(1, index).clamp_(min=math.log(eps))
    return torch.add(mitigation, (scores - own).clamp_(min=0), alpha=q)
