"""Contrast with a copy that lacks the rationale: the prediction must be worse without what people gave as reason."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losses._checks import REDUCTIONS, accumulation_dtype, check_shape, in_range, one_of
from losses.classification._per_sample import check_class_indices, reduce

__all__ = ["RationaleMarginLoss", "rationale_margin_loss"]


def rationale_margin_loss(
    logits: Tensor,
    logits_without: Tensor,
    target: Tensor,
    *,
    margin: float = 1.0,
    present: Tensor | None = None,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    r"""Demand that the score of the target class falls by a margin once the rationale is taken out.

    .. math::
        \ell_n = s_n \max\bigl(0, \; \mu - (s(x_n) - s(x_n \setminus r_n))\bigr), \qquad
        s(x) = z_y - \log \sum_{k \ne y} e^{z_k}

    The score is the log-odds of the target class against all others. With two classes it is ``z_y - z_other``, the
    signed score for which the paper states its constraint; with any number it stays put when a constant is added to all
    logits, so the model cannot buy the margin by shifting them, and it does not saturate as a log-probability does. A
    margin of 1 asks that the odds fall by a factor of *e*.

    Needs no attention weights and no gradient by inputs: a second forward pass is the whole cost. It says what must
    matter; for what must not, use :func:`~losses.reliance.input_gradient.input_gradient_penalty`.

    Args:
        logits: Unnormalised scores of the samples.
        logits_without: Scores of the same samples with the rationale masked out. Gradients flow through both; detach
            these to leave the masked pass alone.
        target: Class indices.
        margin: By how much, in nats of odds, the score must fall.
        present: ``True`` for samples that have a rationale; ``None`` means all. The others contribute zero, whatever
            their logits.
        sample_weight: Weight of each sample; ``None`` means one.
        reduction: ``"mean"`` over the samples that have a rationale, ``"sum"`` or ``"none"``.
        ignore_index: Class index that contributes neither loss nor count.

    Shape:
        - logits, logits_without: ``(samples, classes)`` with at least two classes
        - target: ``(samples,)`` integer
        - present, sample_weight: ``(samples,)``
        - output: scalar, or ``(samples,)`` for ``reduction="none"``

    Raises:
        ValueError: If a shape does not fit, an argument is out of its range, or (checked on the CPU only) a class index
            is out of range.
        TypeError: If ``target`` has the wrong dtype.

    Example:
        >>> import torch
        >>> model = torch.nn.EmbeddingBag(6, 2, mode="sum")
        >>> _ = model.weight.data.zero_()
        >>> tokens = torch.tensor([[3, 4, 5]])
        >>> rationale = torch.tensor([[False, True, False]])
        >>> without = tokens.masked_fill(rationale, 0)  # 0 stands for the tokenizer's mask token
        >>> loss = rationale_margin_loss(model(tokens), model(without), torch.tensor([1]))
        >>> loss
        tensor(1., grad_fn=<DivBackward0>)
        >>> loss.backward()
        >>> model.weight.grad[[3, 4, 0]]  # only what the rationale changes is moved
        tensor([[ 0.,  0.],
                [ 1., -1.],
                [-1.,  1.]])

    References:
        Zaidan, Eisner and Piatko, "Using 'Annotator Rationales' to Improve Machine Learning for Text Categorization",
        NAACL 2007: contrast examples and their margin, there for a support vector machine.
    """
    one_of("reduction", reduction, REDUCTIONS)
    in_range("margin", margin, 0)
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(
            f"`logits` must have shape (samples, classes) with at least two classes, got {tuple(logits.shape)}. Give a "
            "binary model with one logit z the columns (0, z)."
        )
    check_shape("logits_without", logits_without, logits.shape, "of `logits`")
    target = check_class_indices(logits, target, ignore_index)
    counted = target != ignore_index
    if present is not None:
        check_shape("present", present, target.shape, "(samples,)")
        counted = counted & (present != 0)
    index = torch.where(counted, target, 0)
    score, without = (_log_odds(torch.where(counted[:, None], part, 0.0), index) for part in (logits, logits_without))
    cost = torch.where(counted, F.relu(margin - (score - without)), 0.0)
    return reduce(cost, sample_weight, counted, reduction)


class RationaleMarginLoss(nn.Module):
    """Demand a worse prediction without the rationale; see :func:`rationale_margin_loss`.

    Args:
        margin: By how much, in nats of odds, the score of the target class must fall.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        ignore_index: Class index that contributes neither loss nor count.

    Shape:
        - forward: as :func:`rationale_margin_loss`

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> criterion = RationaleMarginLoss(margin=2.0)
        >>> logits, logits_without = torch.tensor([[0.0, 1.5]], requires_grad=True), torch.zeros(1, 2)
        >>> loss = criterion(logits, logits_without, torch.tensor([1]))
        >>> loss.backward()
        >>> loss
        tensor(0.5000, grad_fn=<DivBackward0>)
    """

    def __init__(self, margin: float = 1.0, *, reduction: str = "mean", ignore_index: int = -100) -> None:
        super().__init__()
        self.margin = in_range("margin", margin, 0)
        self.reduction = one_of("reduction", reduction, REDUCTIONS)
        self.ignore_index = ignore_index

    def forward(
        self,
        logits: Tensor,
        logits_without: Tensor,
        target: Tensor,
        *,
        present: Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """Return the loss."""
        return rationale_margin_loss(
            logits,
            logits_without,
            target,
            margin=self.margin,
            present=present,
            sample_weight=sample_weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
        )

    def extra_repr(self) -> str:
        """Show how to build the loss again."""
        return f"margin={self.margin}, reduction={self.reduction!r}, ignore_index={self.ignore_index}"


def _log_odds(logits: Tensor, target: Tensor) -> Tensor:
    """Return the score of the target class against all others, ``(samples,)``."""
    logits = logits.to(accumulation_dtype(logits))
    own = F.one_hot(target, logits.shape[1]).bool()
    return logits.gather(1, target[:, None])[:, 0] - logits.masked_fill(own, -torch.inf).logsumexp(dim=1)
