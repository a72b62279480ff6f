"""Make the heads of a layer disagree: on where they look, on what they read, or on what they say."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from losses._checks import REDUCTIONS, check_shape, one_of
from losses.attention._layers import as_layers, layer_mean, reduce_layers, widened
from losses.attention._rows import FLOOR, as_mask, check_query_valid, check_valid, counted_rows, real_rows

__all__ = ["HeadDisagreementLoss", "head_disagreement"]

FORMS = ("attention", "values", "outputs")


def head_disagreement(
    weights: Tensor | Sequence[Tensor],
    valid: Tensor | None = None,
    *,
    of: str = "attention",
    self_pairs: bool = True,
    query_valid: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Measure how much the heads of a layer agree; minimising it makes them disagree.

    Mean similarity over all :math:`H^2` pairs of heads: minus the disagreement of the paper, which adds up rows where
    this averages them. For a row ``q`` of the attention weights, and for a token of the values or outputs,

    .. math::
        \ell_{\text{attention}} = \frac{1}{H^2} \sum_{i, j} \sum_k A_{i q k} A_{j q k}, \qquad
        \ell_{\text{values}} = \frac{1}{H^2} \sum_{i, j} \frac{V_i^\top V_j}{\lVert V_i \rVert \lVert V_j \rVert}

    averaged over a sample's rows or tokens, then over layers, then over samples. The sum over pairs is
    :math:`\lVert \sum_i A_i \rVert^2`, so that no matrix of heads by heads is built: one pass over ``weights``.

    The pairs of the paper include each head with itself. Among values and outputs that adds a constant, ``1 / H``.
    Among attention weights it does not: :math:`\sum_k A_{iqk}^2` also flattens every head, even heads that already look
    at different keys. Leave those pairs out (``self_pairs=False``) where heads should be sharp *and* different, beside
    a sparsity term for example; one head alone then costs zero.

    The loss lies in ``[0, 1]``; without those pairs, among values and outputs of ``H`` heads, in ``[-1 / (H - 1), 1]``.
    Vectors shorter than :math:`2^{-20}` have no direction, and are similar to none.

    Args:
        weights: Attention weights after the softmax; or, told by ``of``, the values or the outputs of the heads before
            they are concatenated. Of one layer or of several.
        valid: ``True`` for real tokens, ``False`` for padding; ``None`` takes every key, or token. Where
            ``queries == keys`` and no ``query_valid`` is given, it also leaves out the rows of padding.
        of: What ``weights`` holds: ``"attention"``, ``"values"`` or ``"outputs"``. The last two are computed alike.
        self_pairs: Count each head's similarity to itself, as the paper does.
        query_valid: ``True`` for the real tokens among the queries of cross-attention. ``None`` takes a layer with
            ``queries == keys`` for self-attention, whose queries are the tokens that keys are, and every other for
            cross-attention between real queries: pass it wherever cross-attention may have as many queries as keys. For
            ``of="attention"`` only.
        reduction: ``"mean"`` over samples, ``"sum"`` or ``"none"``.

    Shape:
        - weights: ``(batch, heads, queries, keys)``, or ``(batch, heads, tokens, head_dim)``
        - valid: ``(batch, keys)``, or ``(batch, tokens)``
        - query_valid: ``(batch, queries)``
        - output: scalar, or ``(batch,)`` for ``reduction="none"``

    Raises:
        ValueError: If an argument is not among the allowed ones, there is no layer, ``query_valid`` meets values or
            outputs, a shape does not fit or (checked on the CPU only) a mask has values outside ``[0, 1]`` or attention
            weights are not those after a softmax.
        TypeError: If ``weights`` holds something else than floating tensors.

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
    if query_valid is not None and of != "attention":
        raise ValueError(f"`query_valid` needs of='attention', got of={of!r}, where `valid` tells the real tokens.")
    layers = as_layers(weights)
    query_valid = check_query_valid(query_valid, layers)
    with torch.autocast(layers[0].device.type, enabled=False):
        if of == "attention":
            costs = [_attention_layer(layer, valid, query_valid, self_pairs) for layer in layers]
        else:
            costs = [_vector_layer(layer, valid, self_pairs) for layer in layers]
        return reduce_layers(costs, None, reduction)


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

    def forward(
        self, weights: Tensor | Sequence[Tensor], valid: Tensor | None = None, *, query_valid: Tensor | None = None
    ) -> Tensor:
        """Return the agreement of the heads in ``weights``, which may hold values or outputs."""
        return head_disagreement(
            weights,
            valid,
            of=self.of,
            self_pairs=self.self_pairs,
            query_valid=query_valid,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """Show how to build the loss again."""
        return f"of={self.of!r}, self_pairs={self.self_pairs}, reduction={self.reduction!r}"


def _attention_layer(
    layer: Tensor, valid: Tensor | None, query_valid: Tensor | None, self_pairs: bool
) -> tuple[Tensor, Tensor]:
    valid = check_valid(valid, layer)
    parts = widened(layer)
    summed = parts.sum(dim=1)  # (batch, queries, keys)
    if valid is not None:
        summed = summed * valid[:, None, :]
        parts = parts if self_pairs else parts * valid[:, None, None, :]
    similarity = _mean_over_pairs(summed, parts, self_pairs)[:, None]  # (batch, 1, queries)
    rows = real_rows(layer, valid, query_valid)
    return layer_mean(similarity, counted_rows(summed.detach().sum(dim=-1)[:, None], rows))


def _vector_layer(layer: Tensor, valid: Tensor | None, self_pairs: bool) -> tuple[Tensor, Tensor]:
    vectors = widened(layer)
    square = vectors.square().sum(dim=-1, keepdim=True)
    short = square <= FLOOR**2
    units = vectors * torch.where(short, 1.0, square).rsqrt() * ~short
    similarity = _mean_over_pairs(units.sum(dim=1), units, self_pairs)[:, None]  # (batch, 1, tokens)
    if valid is None:
        return layer_mean(similarity, torch.ones_like(similarity, dtype=torch.bool))
    check_shape("valid", valid, (layer.shape[0], layer.shape[2]), "(batch, tokens)")
    return layer_mean(similarity, as_mask("valid", valid)[:, None])


def _mean_over_pairs(summed: Tensor, parts: Tensor, self_pairs: bool) -> Tensor:
    """Return the mean inner product over pairs of ``parts``, given their sum, ``(batch, rows)``."""
    heads = parts.shape[1]
    total = summed.square().sum(dim=-1)
    if self_pairs:
        return total / heads**2
    own = parts.square().sum(dim=(1, -1))
    return (total - own) / max(heads * (heads - 1), 1)
