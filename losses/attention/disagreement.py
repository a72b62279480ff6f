"""Make the heads of a layer disagree: on where they look, on what they read, or on what they say."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from losses._checks import REDUCTIONS, accumulation_dtype, check_shape, one_of
from losses.attention._layers import EMPTY_ROW, as_layers, check_valid, layer_mean, real_rows, reduce_layers

__all__ = ["HeadDisagreementLoss", "head_disagreement"]

FORMS = ("attention", "values", "outputs")
_SHORT = 2.0**-20  # a vector of a smaller norm has no direction
_SHORT_HALF = 2.0**-10  # float16 gradients overflow at 65504


def head_disagreement(
    tensor: Tensor | Sequence[Tensor],
    valid: Tensor | None = None,
    *,
    of: str = "attention",
    self_pairs: bool = True,
    reduction: str = "mean",
) -> Tensor:
    r"""Measure how much the heads of a layer agree; minimising it makes them disagree.

    Mean similarity over all :math:`H^2` pairs of heads: minus the disagreement of the paper, which adds up rows where
    this averages them. For a row ``q`` of the attention weights, and for a token of the values or outputs,

    .. math::
        \ell_{\text{attention}} = \frac{1}{H^2} \sum_{i, j} \sum_k A_{i q k} A_{j q k}, \qquad
        \ell_{\text{values}} = \frac{1}{H^2} \sum_{i, j} \frac{V_i^\top V_j}{\lVert V_i \rVert \lVert V_j \rVert}

    averaged over a sample's rows or tokens, then over layers, then over samples. The sum over pairs is
    :math:`\lVert \sum_i A_i \rVert^2`, so that no matrix of heads by heads is built: one pass over the tensor.

    The pairs of the paper include each head with itself. Among values and outputs that adds a constant, ``1 / H``.
    Among attention weights it does not: :math:`\sum_k A_{iqk}^2` also flattens every head, even heads that already look
    at different keys. Leave those pairs out (``self_pairs=False``) where heads should be sharp *and* different, beside
    a sparsity term for example; one head alone then costs zero.

    Args:
        tensor: Attention weights after the softmax, or the values or outputs of the heads before they are concatenated;
            of one layer or of several.
        valid: ``True`` for real tokens, ``False`` for padding; ``None`` takes every one. Leaves out keys, and rows too
            where ``queries == keys``, or tokens.
        of: What ``tensor`` holds: ``"attention"``, ``"values"`` or ``"outputs"``. The last two are computed alike.
        self_pairs: Count each head's similarity to itself, as the paper does.
        reduction: ``"mean"`` over samples, ``"sum"`` or ``"none"``.

    Shape:
        - tensor: ``(batch, heads, queries, keys)``, or ``(batch, heads, tokens, head_dim)``
        - valid: ``(batch, keys)``, or ``(batch, tokens)``
        - output: scalar, or ``(batch,)`` for ``reduction="none"``; at most 1

    Raises:
        ValueError: If an argument is not among the allowed ones, there is no layer, or a shape does not fit.
        TypeError: If ``tensor`` holds something else than tensors.

    Example:
        >>> scores = torch.tensor([[2.0, 0.0, 0.0], [1.0, 0.0, 0.0]]).reshape(1, 2, 1, 3).requires_grad_()
        >>> loss = head_disagreement(scores.softmax(dim=-1))
        >>> loss
        tensor(0.5152, grad_fn=<DivBackward0>)
        >>> loss.backward()
        >>> scores.grad[0, :, 0, 0] > 0
        tensor([True, True])

    References:
        Li et al., "Multi-Head Attention with Disagreement Regularization", EMNLP 2018 (positions, subspaces, outputs).
    """
    one_of("of", of, FORMS)
    one_of("reduction", reduction, REDUCTIONS)
    layers = as_layers(tensor, "tensor")
    measure = _attention_layer if of == "attention" else _vector_layer
    with torch.autocast(layers[0].device.type, enabled=False):
        return reduce_layers([measure(layer, valid, self_pairs) for layer in layers], None, reduction)


class HeadDisagreementLoss(nn.Module):
    """Push the heads of a layer apart; see :func:`head_disagreement`.

    Args:
        of: What the module is called with: ``"attention"``, ``"values"`` or ``"outputs"``.
        self_pairs: Count each head's similarity to itself, as the paper does.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Shape:
        - forward: as :func:`head_disagreement`

    Raises:
        ValueError: If an argument is not among the allowed ones.

    Example:
        >>> disagreement = HeadDisagreementLoss(of="outputs")
        >>> outputs = torch.tensor([[1.0, 0.0], [1.0, 1.0]]).reshape(1, 2, 1, 2).requires_grad_()
        >>> loss = disagreement(outputs)
        >>> loss.backward()
        >>> loss
        tensor(0.8536, grad_fn=<DivBackward0>)
    """

    def __init__(self, of: str = "attention", *, self_pairs: bool = True, reduction: str = "mean") -> None:
        super().__init__()
        self.of = one_of("of", of, FORMS)
        self.self_pairs = self_pairs
        self.reduction = one_of("reduction", reduction, REDUCTIONS)

    def forward(self, tensor: Tensor | Sequence[Tensor], valid: Tensor | None = None) -> Tensor:
        """Return the agreement of the heads in ``tensor``."""
        return head_disagreement(tensor, valid, of=self.of, self_pairs=self.self_pairs, reduction=self.reduction)

    def extra_repr(self) -> str:
        """Show how to build the loss again."""
        return f"of={self.of!r}, self_pairs={self.self_pairs}, reduction={self.reduction!r}"


def _attention_layer(layer: Tensor, valid: Tensor | None, self_pairs: bool) -> tuple[Tensor, Tensor]:
    valid = check_valid(valid, layer)
    summed = layer.sum(dim=1, dtype=accumulation_dtype(layer))  # (batch, queries, keys)
    if valid is not None:
        summed = summed * valid[:, None, :]
        layer = layer if self_pairs else layer * valid[:, None, None, :]
    counted = (summed.detach().sum(dim=-1) > EMPTY_ROW)[:, None]  # (batch, 1, queries)
    rows = real_rows(layer, valid)
    similarity = _mean_over_pairs(summed, layer, self_pairs)
    return layer_mean(similarity[:, None], counted if rows is None else counted & rows)


def _vector_layer(layer: Tensor, valid: Tensor | None, self_pairs: bool) -> tuple[Tensor, Tensor]:
    short = _SHORT_HALF if layer.dtype == torch.float16 else _SHORT
    vectors = layer.to(accumulation_dtype(layer))
    square = vectors.square().sum(dim=-1, keepdim=True)
    long = square > short**2
    units = vectors * torch.where(long, square, 1.0).rsqrt() * long
    similarity = _mean_over_pairs(units.sum(dim=1), units, self_pairs)[:, None]  # (batch, 1, tokens)
    if valid is None:
        return layer_mean(similarity, torch.ones_like(similarity, dtype=torch.bool))
    check_shape("valid", valid, (layer.shape[0], layer.shape[2]), "(batch, tokens)")
    return layer_mean(similarity, (valid != 0)[:, None])


def _mean_over_pairs(summed: Tensor, parts: Tensor, self_pairs: bool) -> Tensor:
    """Return the mean inner product over pairs of ``parts``, given their sum, ``(batch, rows)``."""
    heads = parts.shape[1]
    total = summed.square().sum(dim=-1)
    if self_pairs:
        return total / heads**2
    own = parts.to(summed.dtype).square().sum(dim=(1, -1))
    return (total - own) / max(heads * (heads - 1), 1)
