"""Guide cross-attention by gold links between the tokens of two sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from losses._checks import REDUCTIONS, ROUNDING, accumulation_dtype, check_shape, check_within, one_of
from losses.attention._layers import as_layers, layer_mean, reduce_layers, widened
from losses.attention._mass import key_sums
from losses.attention._rows import FLOOR, check_query_valid, check_valid, counted_rows

__all__ = ["GuidedAlignmentLoss", "guided_alignment"]


def guided_alignment(
    weights: Tensor | Sequence[Tensor],
    target_mask: Tensor,
    valid: Tensor | None = None,
    *,
    head: int | None = None,
    query_valid: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Compute the cross entropy between gold links and cross-attention.

    .. math::
        \ell = -\frac{1}{T} \sum_{t, s} \frac{A_{ts}}{\sum_r A_{tr}} \log a_{ts}

    with :math:`A` the links and :math:`a` the attention of query ``t`` to key ``s``, as a share of its weights on real
    keys. Use it where word alignments, or links between regions and words, are known; one head that aligns leaves the
    others free. Averaged over heads, then over layers, then over the samples that have a link. One pass over the
    weights and one logarithm for each.

    ``T`` counts the real queries if ``query_valid`` tells them, as in the papers, else the queries with a link, since
    padding would dilute the loss. A query without a link costs nothing. Below :math:`2^{-20}` the
    logarithm continues as its tangent, so that cost and gradient stay finite at a weight of zero.

    Args:
        weights: Cross-attention weights after the softmax, of one layer or of several. The layer before the last
            aligns best in the transformer of Garg et al.
        target_mask: Links, boolean or in ``[0, 1]``.
        valid: ``True`` for the real tokens among the keys (the source), ``False`` for padding; ``None`` takes every
            key. It says nothing about the queries, also where there are as many.
        head: Index of the one head to guide; ``None`` guides every head.
        query_valid: ``True`` for the real tokens among the queries (the target sequence).
        reduction: ``"mean"`` over samples with links, ``"sum"`` or ``"none"``.

    Shape:
        - weights: ``(batch, heads, queries, keys)``; heads may differ between layers
        - target_mask: ``(batch, queries, keys)``
        - valid: ``(batch, keys)``
        - query_valid: ``(batch, queries)``
        - output: scalar, or ``(batch,)`` for ``reduction="none"``; in nats

    Raises:
        ValueError: If there is no layer, a shape does not fit, a layer has no head of the index ``head`` or (checked on
            the CPU only) a mask has values outside ``[0, 1]`` or the weights are not those after a softmax.
        TypeError: If ``weights`` holds something else than floating tensors, or ``head`` is no whole number.

    Example:
        >>> scores = torch.zeros(1, 1, 2, 4, requires_grad=True)
        >>> links = torch.tensor([[[1, 0, 0, 0], [0, 1, 1, 0]]])
        >>> loss = guided_alignment(scores.softmax(dim=-1), links)
        >>> loss
        tensor(1.3863, grad_fn=<DivBackward0>)
        >>> loss.backward()
        >>> scores.grad[0, 0]
        tensor([[-0.3750,  0.1250,  0.1250,  0.1250],
                [ 0.1250, -0.1250, -0.1250,  0.1250]])

    References:
        Chen et al., "Guided Alignment Training for Topic-Aware Neural Machine Translation", AMTA 2016.
        Garg et al., "Jointly Learning to Align and Translate with Transformer Models", EMNLP 2019 (one head).
    """
    one_of("reduction", reduction, REDUCTIONS)
    _check_head(head)
    layers = as_layers(weights)
    _check_links(target_mask, layers)
    valid, query_valid = check_valid(valid, layers[0]), check_query_valid(query_valid, layers)
    links = _links(layers[0], target_mask, valid, query_valid)
    present = links.flatten(1).any(dim=1)
    with torch.autocast(layers[0].device.type, enabled=False):
        picked = [_pick(layer, head, index) for index, layer in enumerate(layers)]
        return reduce_layers([_layer_cost(layer, links, valid, query_valid) for layer in picked], present, reduction)


class GuidedAlignmentLoss(nn.Module):
    """Pull cross-attention to gold links; see :func:`guided_alignment`.

    Args:
        head: Index of the one head to guide; ``None`` guides every head.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Shape:
        - forward: as :func:`guided_alignment`

    Raises:
        ValueError: If ``head`` is negative or ``reduction`` is not among the allowed ones.
        TypeError: If ``head`` is no whole number.

    Example:
        >>> alignment = GuidedAlignmentLoss(head=0)
        >>> scores = torch.zeros(1, 2, 3, 3, requires_grad=True)
        >>> loss = alignment(scores.softmax(dim=-1), torch.eye(3)[None])
        >>> loss.backward()
        >>> scores.grad.abs().sum(dim=(0, 2, 3)) > 0
        tensor([ True, False])
    """

    def __init__(self, head: int | None = None, *, reduction: str = "mean") -> None:
        super().__init__()
        self.head = _check_head(head)
        self.reduction = one_of("reduction", reduction, REDUCTIONS)

    def forward(
        self,
        weights: Tensor | Sequence[Tensor],
        target_mask: Tensor,
        valid: Tensor | None = None,
        *,
        query_valid: Tensor | None = None,
    ) -> Tensor:
        """Return the cross entropy between the links ``target_mask`` and the attention ``weights``."""
        return guided_alignment(
            weights, target_mask, valid, head=self.head, query_valid=query_valid, reduction=self.reduction
        )

    def extra_repr(self) -> str:
        """Show how to build the loss again."""
        return f"head={self.head}, reduction={self.reduction!r}"


def _check_head(head: int | None) -> int | None:
    if head is not None and (isinstance(head, bool) or not isinstance(head, int)):
        raise TypeError(f"`head` must be the index of a head, or None for every head, got {head!r}.")
    if head is not None and head < 0:
        raise ValueError(f"`head` must be at least 0, got {head}: count heads from the first.")
    return head


def _pick(layer: Tensor, head: int | None, index: int) -> Tensor:
    if head is None:
        return layer
    if head >= layer.shape[1]:
        raise ValueError(
            f"`head` must be between 0 and {layer.shape[1] - 1}, since `weights[{index}]` has {layer.shape[1]} heads, "
            f"got {head}."
        )
    return layer[:, head : head + 1]


def _check_links(target_mask: Tensor, layers: Sequence[Tensor]) -> None:
    for index, layer in enumerate(layers):
        expected = layer[:, 0].shape
        check_shape("target_mask", target_mask, expected, f"(batch, queries, keys) of `weights[{index}]`")
    check_within("target_mask", target_mask.detach(), 0, 1, slack=ROUNDING)


def _links(layer: Tensor, target_mask: Tensor, valid: Tensor | None, query_valid: Tensor | None) -> Tensor:
    """Return the links between real tokens, each row of sum one or zero, ``(batch, queries, keys)``."""
    links = target_mask.to(accumulation_dtype(layer))
    if valid is not None:
        links = links * valid[:, None, :]
    if query_valid is not None:
        links = links * query_valid[:, :, None]
    total = links.sum(dim=-1, keepdim=True)
    return links / torch.where(total > 0, total, 1.0)


def _layer_cost(
    layer: Tensor, links: Tensor, valid: Tensor | None, query_valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return each sample's mean cost and whether any row counts, both ``(batch,)``."""
    rows = widened(layer)
    total = rows.sum(dim=-1) if valid is None else key_sums(rows, valid.to(rows.dtype))[0]
    linked = links.any(dim=-1)[:, None]  # (batch, 1, queries)
    logarithm: Tensor = _LinkedLogarithm.apply(rows, links[:, None], FLOOR)  # type: ignore[no-untyped-call]
    cost = torch.where(linked, total.clamp(min=FLOOR).log(), 0.0) - logarithm  # (batch, heads, queries)
    return layer_mean(cost, counted_rows(total, linked if query_valid is None else query_valid[:, None]))


class _LinkedLogarithm(Function):
    """Sum of links times logarithms of each row; its own backward, since that of the clamp would take four passes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, links: Tensor, floor: float) -> Tensor:
        held = rows.clamp_min(floor)
        below = rows - held
        logarithm: Tensor = torch.einsum("buqk,bhqk->bhq", links, held.log_().add_(below, alpha=1 / floor))
        return logarithm

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        rows, links, ctx.floor = inputs
        ctx.save_for_backward(rows, links)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        rows, links = ctx.saved_tensors
        by_rows: Tensor = gradient.unsqueeze(-1) * links / rows.clamp_min(ctx.floor)
        return by_rows, None, None
