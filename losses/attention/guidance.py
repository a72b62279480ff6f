"""Guide attention: reward it on relevant tokens, suppress it on spurious ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from losses._checks import REDUCTIONS, one_of
from losses.attention._forms import DISTRIBUTION_FORMS, divergence
from losses.attention._layers import as_layers, layer_mean, reduce_layers, widened
from losses.attention._mass import Degrees, degrees, mass, surprise
from losses.attention._rows import FLOOR, check_query_valid, check_valid, counted_rows, real_rows

__all__ = ["AttentionGuidedLoss", "attention_guidance"]

MASS_FORMS = ("mass", "log")
FORMS = MASS_FORMS + DISTRIBUTION_FORMS
QUERIES = ("all", "first")


def attention_guidance(
    weights: Tensor | Sequence[Tensor],
    target_mask: Tensor | None = None,
    valid: Tensor | None = None,
    *,
    spurious: Tensor | None = None,
    query_valid: Tensor | None = None,
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
    whatever the length; it presses harder the further attention is off. These two do not mind how attention is spread
    within the set. The others want the whole row to be the target :math:`t = r / \sum_j r_j` over valid keys:

    .. math::
        \ell_{\text{kl}} = \frac{\mathrm{KL}(t \,\Vert\, a)}{\mathrm{KL}(t \,\Vert\, \text{uniform})}, \qquad
        \ell_{\text{js}} = \frac{\mathrm{JS}(a, t)}{\log 2}, \qquad
        \ell_{\text{iou}} = 1 - \frac{\sum_j \min(a_j, t_j)}{\sum_j \max(a_j, t_j)}

    with ``a`` renormalised over valid keys. All are 0 at the target; ``"kl"`` is exactly 1 when attention is uniform
    (undivided where the target itself is), ``"js"`` and ``"iou"`` lie in ``[0, 1]``. Costs are averaged over a sample's
    rows and heads, then over layers, then over the samples that carry the annotation; the two terms add up. ``"mass"``
    and ``"log"`` take one pass over the weights, ``"iou"`` three, ``"kl"`` one logarithm per weight and ``"js"`` two.
    No second softmax, which would flatten the target with the length of the text. ``"log"`` is this library's own.

    No annotation is never a target of its own: samples without a relevant (spurious) valid key contribute nothing and
    leave the average, as do rows without weight on valid keys. Where every valid key is in the set, ``"mass"`` and
    ``"log"`` leave no choice: the cost is 0 (relevant) or 1 (spurious), without a gradient.

    Args:
        weights: Attention weights after the softmax, of one layer or of several. Guidance of the last layer alone tends
            to fail: information flows around it.
        target_mask: Relevance of each key, boolean or in ``[0, 1]``; ``None`` rewards nothing.
        valid: ``True`` for real tokens, ``False`` for padding; ``None`` takes every key. Where ``queries == keys`` and
            no ``query_valid`` is given, it also leaves out the rows of padding.
        spurious: Degree to which each key is spurious, boolean or in ``[0, 1]``; ``None`` suppresses nothing. For
            ``"mass"`` and ``"log"`` only.
        query_valid: ``True`` for the real tokens among the queries of cross-attention. ``None`` takes a layer with
            ``queries == keys`` for self-attention, whose queries are the tokens that keys are, and every other for
            cross-attention between real queries: pass it wherever cross-attention may have as many queries as keys.
        form: ``"mass"``, ``"log"``, ``"kl"``, ``"js"`` or ``"iou"``.
        queries: ``"all"`` rows, or the ``"first"`` valid one, where the classification token sits. In causal attention,
            early rows that cannot reach a relevant key count as misses.
        reduction: ``"mean"`` over annotated samples (each term by its own number), ``"sum"`` or ``"none"``.

    Shape:
        - weights: ``(batch, heads, queries, keys)``; heads and queries may differ between layers
        - target_mask, valid, spurious: ``(batch, keys)``
        - query_valid: ``(batch, queries)``
        - output: scalar, or ``(batch,)`` for ``reduction="none"``

    Raises:
        ValueError: If neither ``target_mask`` nor ``spurious`` is given, ``spurious`` meets a form that does not take
            it, there are no weights, a shape does not fit or (checked on the CPU only) a mask has values outside
            ``[0, 1]`` or the weights are not those after a softmax.
        TypeError: If ``weights`` holds something else than floating tensors.

    Example:
        >>> scores = torch.zeros(1, 1, 2, 4, requires_grad=True)
        >>> relevance = torch.tensor([[True, False, False, False]])
        >>> loss = attention_guidance(scores.softmax(dim=-1), relevance)
        >>> loss
        tensor(0.7500, grad_fn=<SumBackward1>)
        >>> loss.backward()
        >>> scores.grad[0, 0, 0]
        tensor([-0.0938,  0.0312,  0.0312,  0.0312])

    References:
        Chen et al., "Guided Alignment Training for Topic-Aware Neural Machine Translation", AMTA 2016 (``"kl"`` up to a
        constant and its unit: the cross entropy against a distribution).
        Mathew et al., "HateXplain: A Benchmark Dataset for Explainable Hate Speech Detection", AAAI 2021 (the same, on
        the first row of the last layer).
        Chefer et al., "Optimizing Relevance Maps of Vision Transformers Improves Robustness", NeurIPS 2022 (reward
        foreground, suppress background).
    """
    one_of("form", form, FORMS)
    one_of("queries", queries, QUERIES)
    one_of("reduction", reduction, REDUCTIONS)
    _check_terms(target_mask, spurious, form)
    layers = as_layers(weights)
    valid, query_valid = check_valid(valid, layers[0]), check_query_valid(query_valid, layers)
    masks = {"target_mask": target_mask, "spurious": spurious}
    sets = {name: degrees(name, mask, valid, layers[0]) for name, mask in masks.items() if mask is not None}
    with torch.autocast(layers[0].device.type, enabled=False):
        by_layer = [_layer_costs(layer, valid, query_valid, sets, form, queries) for layer in layers]
        terms = [
            reduce_layers(costs, keys.member.sum(dim=1) > 0, reduction)
            for costs, keys in zip(zip(*by_layer, strict=True), sets.values(), strict=True)
        ]
        return torch.stack(terms).sum(dim=0)


class AttentionGuidedLoss(nn.Module):
    """Reward attention on relevant keys, suppress it on spurious ones; see :func:`attention_guidance`.

    Args:
        form: ``"mass"``, ``"log"``, ``"kl"``, ``"js"`` or ``"iou"``.
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
        tensor(1., grad_fn=<SumBackward1>)
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
        query_valid: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of the attention ``weights``."""
        return attention_guidance(
            weights,
            target_mask,
            valid,
            spurious=spurious,
            query_valid=query_valid,
            form=self.form,
            queries=self.queries,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """Show how to build the loss again."""
        return f"form={self.form!r}, queries={self.queries!r}, reduction={self.reduction!r}"


def _check_terms(target_mask: Tensor | None, spurious: Tensor | None, form: str) -> None:
    if target_mask is None and spurious is None:
        raise ValueError("Nothing to guide by: pass `target_mask` to reward keys, or `spurious` to suppress keys.")
    if spurious is not None and form not in MASS_FORMS:
        forms = " or ".join(f"form={name!r}" for name in MASS_FORMS)
        raise ValueError(f"`spurious` needs {forms}, got form={form!r}, which takes `target_mask` alone.")


def _layer_costs(
    layer: Tensor,
    valid: Tensor | None,
    query_valid: Tensor | None,
    sets: dict[str, Degrees],
    form: str,
    queries: str,
) -> list[tuple[Tensor, Tensor]]:
    """Return, for each set, every sample's mean cost ``(batch,)`` and whether it has any row ``(batch,)``."""
    rows, real = layer, real_rows(layer, valid, query_valid)
    if queries == "first":
        rows, real = _first_rows(layer, real)
    rows = widened(rows)
    if form in DISTRIBUTION_FORMS:
        cost, total = divergence(rows, valid, sets["target_mask"], form)
        costs, counted = [cost], counted_rows(total, real)
    else:
        degree = next(iter(sets.values())).real
        wanted = [keys.member if name == "target_mask" else degree - keys.member for name, keys in sets.items()]
        hits, total = mass(rows, degree, *wanted)
        costs, counted = _mass_costs(hits, degree, wanted, form), counted_rows(total, real, *hits)
    return [layer_mean(cost, counted) for cost in costs]


def _mass_costs(hits: list[Tensor], real: Tensor, wanted: list[Tensor], form: str) -> list[Tensor]:
    """Return the cost of each row for each set, ``(batch, heads, rows)``."""
    if form == "mass":
        return [1 - hit for hit in hits]
    count = real.sum(dim=1).clamp(min=1)
    uniform = [surprise(keys.sum(dim=1) / count) for keys in wanted]  # what a uniform row costs, (batch,)
    units = [torch.where(cost > FLOOR, cost, 1.0)[:, None, None] for cost in uniform]
    return [surprise(hit) / unit for hit, unit in zip(hits, units, strict=True)]


def _first_rows(layer: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the first real row of each sample, ``(batch, heads, 1, keys)``, and whether there is one."""
    if real is None:
        return layer[:, :, :1], None
    first = real[:, 0].int().argmax(dim=1)  # not row 0 where padding stands on the left
    rows = layer[torch.arange(len(first), device=first.device), :, first].unsqueeze(2)
    return rows, real.any(dim=-1, keepdim=True)
