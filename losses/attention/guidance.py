"""Guide attention: reward its mass on relevant tokens, suppress its mass on spurious ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from losses._checks import REDUCTIONS, accumulation_dtype, check_shape, check_within, one_of

__all__ = ["AttentionGuidedLoss", "attention_guidance"]

FORMS = ("mass", "log")
QUERIES = ("all", "first")
_EMPTY_ROW = 2.0**-20  # a row whose weights on valid keys sum to less attends to nothing
_FLOOR = 2.0**-20  # smallest mass under a logarithm; a power of two, so that full mass costs exactly zero
_FLOOR_HALF = 2.0**-10  # float16 gradients overflow at 65504


def attention_guidance(
    weights: Tensor | Sequence[Tensor],
    target_mask: Tensor | None = None,
    valid: Tensor | None = None,
    *,
    spurious: Tensor | None = None,
    form: str = "mass",
    queries: str = "all",
    reduction: str = "mean",
) -> Tensor:
    r"""Penalise attention that misses the relevant keys or falls on the spurious ones.

    The mass of a row on a set of keys is the share :math:`m = \sum_j r_j a_j / \sum_j a_j` of its weights on valid
    keys. With :math:`u` the mass of a uniform row and :math:`h = m` (relevant) or :math:`h = 1 - m` (spurious),

    .. math::
        \ell_{\text{mass}} = 1 - h, \qquad \ell_{\log} = \frac{\log h}{\log h_u}, \quad h_u = u \text{ or } 1 - u

    so ``"mass"`` lies in ``[0, 1]``, and ``"log"`` is 0 when attention does as wanted and exactly 1 when it is uniform,
    whatever the length; it presses harder the further attention is off. Costs are averaged over a sample's rows and
    heads, then over layers, then over the samples that carry the annotation; the two terms add up. One pass over the
    weights, no second softmax.

    No annotation is never a target of its own: samples without a relevant (spurious) valid key contribute nothing and
    leave the average, as do rows without weight on valid keys. Where every valid key is in the set there is no choice:
    the cost is 0 (relevant) or 1 (spurious), without a gradient.

    Args:
        weights: Attention weights after the softmax, of one layer or of several. Guidance of the last layer alone tends
            to fail: information flows around it.
        target_mask: Relevance of each key, boolean or in ``[0, 1]``; ``None`` rewards nothing.
        valid: ``True`` for real tokens, ``False`` for padding; ``None`` takes every key. Where ``queries == keys``, it
            also leaves out the rows of padding.
        spurious: Degree to which each key is spurious, boolean or in ``[0, 1]``; ``None`` suppresses nothing.
        form: ``"mass"`` or ``"log"``.
        queries: ``"all"`` rows, or the ``"first"`` valid one, where the classification token sits. In causal attention,
            early rows that cannot reach a relevant key count as misses.
        reduction: ``"mean"`` over annotated samples (each term by its own number), ``"sum"`` or ``"none"``.

    Shape:
        - weights: ``(batch, heads, queries, keys)``; heads and queries may differ between layers
        - target_mask, valid, spurious: ``(batch, keys)``
        - output: scalar, or ``(batch,)`` for ``reduction="none"``

    Raises:
        ValueError: If neither ``target_mask`` nor ``spurious`` is given, there are no weights, a shape does not fit or
            (checked on the CPU only) a mask has values outside ``[0, 1]``.
        TypeError: If ``weights`` holds something else than tensors.

    Example:
        >>> scores = torch.zeros(1, 1, 2, 4, requires_grad=True)
        >>> relevance = torch.tensor([[True, False, False, False]])
        >>> loss = attention_guidance(scores.softmax(dim=-1), relevance)
        >>> loss
        tensor(0.7500, grad_fn=<SumBackward0>)
        >>> loss.backward()
        >>> scores.grad[0, 0, 0]
        tensor([-0.0938,  0.0312,  0.0312,  0.0312])

    References:
        Chen et al., "Guided Alignment Training for Topic-Aware Neural Machine Translation", AMTA 2016 (one head, log).
        Mathew et al., "HateXplain: A Benchmark Dataset for Explainable Hate Speech Detection", AAAI 2021 (first row).
        Chefer et al., "Optimizing Relevance Maps of Vision Transformers Improves Robustness", NeurIPS 2022 (reward
        foreground, suppress background).
    """
    one_of("form", form, FORMS)
    one_of("queries", queries, QUERIES)
    one_of("reduction", reduction, REDUCTIONS)
    layers = _as_layers(weights)
    sets = _key_sets(layers[0], target_mask, valid, spurious)
    with torch.autocast(layers[0].device.type, enabled=False):
        costs = [_layer_cost(layer, sets, form, queries) for layer in layers]
        seen = torch.stack([counts for _, counts in costs])  # (layers, batch)
        cost = torch.stack([cost for cost, _ in costs]).sum(dim=0) / seen.sum(dim=0).clamp(min=1)[:, None]
        annotated = sets.present & seen.any(dim=0)[:, None]
        cost = torch.where(annotated, cost, 0.0)  # (batch, terms)
        if reduction == "none":
            return cost.sum(dim=1)
        if reduction == "sum":
            return cost.sum()
        return (cost.sum(dim=0) / annotated.sum(dim=0).clamp(min=1)).sum()


class AttentionGuidedLoss(nn.Module):
    """Reward attention on relevant keys, suppress it on spurious ones; see :func:`attention_guidance`.

    Args:
        form: ``"mass"`` or ``"log"``.
        queries: ``"all"`` rows or the ``"first"`` valid one.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Shape:
        - forward: as :func:`attention_guidance`

    Raises:
        ValueError: If an argument is not among the allowed ones.

    Example:
        >>> guidance = AttentionGuidedLoss(form="log")
        >>> scores = torch.zeros(1, 2, 3, 3, requires_grad=True)
        >>> loss = guidance([scores.softmax(dim=-1)], spurious=torch.tensor([[0.0, 0.0, 1.0]]))
        >>> loss.backward()
        >>> loss
        tensor(1., grad_fn=<SumBackward0>)
    """

    def __init__(self, form: str = "mass", queries: str = "all", reduction: str = "mean") -> None:
        super().__init__()
        self.form = one_of("form", form, FORMS)
        self.queries = one_of("queries", queries, QUERIES)
        self.reduction = one_of("reduction", reduction, REDUCTIONS)

    def forward(
        self,
        weights: Tensor | Sequence[Tensor],
        target_mask: Tensor | None = None,
        valid: Tensor | None = None,
        *,
        spurious: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of the attention ``weights``."""
        return attention_guidance(
            weights,
            target_mask,
            valid,
            spurious=spurious,
            form=self.form,
            queries=self.queries,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """Show how to build the loss again."""
        return f"form={self.form!r}, queries={self.queries!r}, reduction={self.reduction!r}"


class _KeySets(NamedTuple):
    """Where attention is wanted: on relevant keys, on keys that are not spurious."""

    valid: Tensor | None
    features: Tensor  # (batch, keys, 1 + terms), the valid keys, then the wanted keys of each term
    uniform: Tensor  # (batch, terms), share of a uniform row that falls on wanted keys
    present: Tensor  # (batch, terms), True for samples that carry the annotation


def _as_layers(weights: Tensor | Sequence[Tensor]) -> list[Tensor]:
    layers = [weights] if isinstance(weights, Tensor) else list(weights)
    if not layers:
        raise ValueError("`weights` holds no layer: the model returned no attention weights. Capture them instead.")
    for index, layer in enumerate(layers):
        if not isinstance(layer, Tensor):
            raise TypeError(f"`weights[{index}]` must be a tensor, got {type(layer).__name__}.")
        if layer.dim() != 4:
            shape = tuple(layer.shape)
            raise ValueError(f"`weights[{index}]` must have 4 axes (batch, heads, queries, keys), got shape {shape}.")
        check_shape(f"weights[{index}]", layer[:, 0, 0], (layers[0].shape[0], layers[0].shape[3]), "(batch, keys)")
    return layers


def _key_sets(layer: Tensor, target_mask: Tensor | None, valid: Tensor | None, spurious: Tensor | None) -> _KeySets:
    if target_mask is None and spurious is None:
        raise ValueError("Nothing to guide by: pass `target_mask` to reward keys, or `spurious` to suppress keys.")
    batch_keys, dtype = (layer.shape[0], layer.shape[3]), accumulation_dtype(layer)
    if valid is not None:
        check_shape("valid", valid, batch_keys, "(batch, keys)")
        valid = valid != 0
    real = layer.new_ones(batch_keys, dtype=dtype) if valid is None else valid.to(dtype)
    columns, present = [real], []
    for name, mask in (("target_mask", target_mask), ("spurious", spurious)):
        if mask is not None:
            check_shape(name, mask, batch_keys, "(batch, keys)")
            check_within(name, mask, 0, 1)
            degree = mask.to(dtype) * real
            columns.append(degree if name == "target_mask" else real - degree)
            present.append(degree.sum(dim=1) > 0)
    features = torch.stack(columns, dim=-1)
    sums = features.sum(dim=1)  # (batch, 1 + terms)
    return _KeySets(valid, features, sums[:, 1:] / sums[:, :1].clamp(min=1), torch.stack(present, dim=-1))


def _layer_cost(layer: Tensor, sets: _KeySets, form: str, queries: str) -> tuple[Tensor, Tensor]:
    """Return each sample's mean cost ``(batch, terms)``, and whether it has any row, ``(batch,)``."""
    floor = _FLOOR_HALF if layer.dtype == torch.float16 else _FLOOR
    rows, kept = _pick_rows(layer, sets.valid, queries)
    sums = rows.to(sets.features.dtype) @ sets.features[:, None]  # (batch, heads, rows, 1 + terms)
    total = sums[..., :1]
    hit = sums[..., 1:] / total.clamp(min=_EMPTY_ROW)  # mass on the wanted keys
    if form == "mass":
        cost = 1 - hit
    else:
        uniform = _surprise(sets.uniform, floor)
        cost = _surprise(hit, floor) / torch.where(uniform > _FLOOR, uniform, 1.0)[:, None, None]
    counted = total > _EMPTY_ROW  # (batch, heads, rows, 1)
    if kept is not None:
        counted = counted & kept[:, None, :, None]
    count = counted.sum(dim=(1, 2))  # (batch, 1)
    return torch.where(counted, cost, 0.0).sum(dim=(1, 2)) / count.clamp(min=1), count[:, 0] > 0


def _pick_rows(layer: Tensor, valid: Tensor | None, queries: str) -> tuple[Tensor, Tensor | None]:
    """Return the rows to guide, ``(batch, heads, rows, keys)``, and which of them are real tokens."""
    padded = valid is not None and layer.shape[2] == layer.shape[3]
    if queries == "all":
        return layer, valid if padded else None
    if not padded or valid is None:
        return layer[:, :, :1], None
    first = valid.int().argmax(dim=1)  # not row 0 where padding stands on the left
    return layer[torch.arange(len(first), device=first.device), :, first].unsqueeze(2), None


def _surprise(hit: Tensor, floor: float) -> Tensor:
    """Return ``-log(hit)``, finite at zero with a gradient there, and exactly zero at one."""
    return -torch.log(floor + (1 - floor) * hit)
