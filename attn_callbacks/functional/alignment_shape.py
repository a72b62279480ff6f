"""What the shape of an alignment says without gold links: order, coverage and confidence."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_callbacks._checks import check_axes, one_of
from attn_callbacks.functional._precision import full_precision
from attn_callbacks.functional.alignment import (
    LINKING,
    alignment_counts,
    count_true,
    largest_links,
    real_pairs,
    real_weights,
)

__all__ = [
    "ALIGNMENT_QUANTITIES",
    "alignment_coverage",
    "alignment_monotonicity",
    "alignment_ratios",
    "coverage_deviation",
]

ALIGNMENT_QUANTITIES: tuple[str, ...] = (
    "error_rate",
    "precision",
    "recall",
    "monotonicity",
    "coverage",
    "coverage_deviation",
    "confidence",
)
"""Names along the third axis of `alignment_ratios`, in order; the first three need gold links."""


def alignment_monotonicity(links: Tensor) -> Tensor:
    """Measure how far links keep the order of the source: the share of steps that do not go back.

    A step leads from one linked target token to the next; it is forward if the source position does not fall. Target
    tokens without a link are passed over. Near 1 for speech and for close languages. A head that looks at one place all
    the time has 1 as well: read it beside the coverage.

    Args:
        links: Links, as from :func:`alignment_links`. Of several links of a target token, the mean position counts.

    Shape:
        - links: bool, ``(batch, heads, queries, keys)``
        - output: ``(batch, heads)``, float64 in [0, 1], NaN below two linked target tokens

    Example:
        >>> alignment_monotonicity(torch.eye(3, dtype=torch.bool)[None, None, [0, 2, 1]])
        tensor([[0.5000]], dtype=torch.float64)
    """
    check_axes("links", links, 4)
    return _divided(_steps(links))


def alignment_coverage(links: Tensor, key_valid: Tensor | None = None) -> Tensor:
    """Measure the share of source tokens that some target token is linked to.

    Low where translation leaves out part of the source, and where a head rests on a few tokens.

    Args:
        links: Links, as from :func:`alignment_links`.
        key_valid: ``True`` for the source tokens that count; ``None`` means all.

    Shape:
        - links: bool, ``(batch, heads, queries, keys)``
        - key_valid: ``(batch, keys)``
        - output: ``(batch, heads)``, float64 in [0, 1], NaN without a source token

    Raises:
        ValueError: If a shape does not fit.

    Example:
        >>> links = torch.tensor([[[[True, False, False], [False, True, False]]]])
        >>> alignment_coverage(links, torch.tensor([[True, True, False]]))
        tensor([[1.]], dtype=torch.float64)
    """
    check_axes("links", links, 4)
    return _divided(_covered(links, real_pairs(links.shape, links.device, None, key_valid)))


def coverage_deviation(
    weights: Tensor, *, query_valid: Tensor | None = None, key_valid: Tensor | None = None
) -> Tensor:
    r"""Measure how far the attention that source tokens receive deviates from one each.

    .. math:: \frac{1}{S} \sum_s \ln\Big(1 + \big(1 - \sum_t a_{ts}\big)^2\Big)

    Zero if every source token receives a total of one; grows with tokens that are forgotten or attended to again and
    again. Unlike :func:`alignment_coverage` it looks at all weights, not at the largest.

    Args:
        weights: Cross-attention weights, rows are target tokens.
        query_valid: ``True`` for the target tokens that count; ``None`` means all.
        key_valid: ``True`` for the source tokens that count; ``None`` means all.

    Shape:
        - weights: ``(batch, heads, queries, keys)``
        - query_valid: ``(batch, queries)``
        - key_valid: ``(batch, keys)``
        - output: ``(batch, heads)``, float64, NaN without a source token

    Raises:
        ValueError: If a shape does not fit.

    Example:
        >>> coverage_deviation(torch.eye(2)[None, None]), coverage_deviation(torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]]))
        (tensor([[0.]], dtype=torch.float64), tensor([[0.6931]], dtype=torch.float64))

    References:
        Rikters and Fishel, "Confidence through Attention", 2017 (coverage deviation penalty, whose sign is the other).
    """
    check_axes("weights", weights, 4)
    real = real_pairs(weights.shape, weights.device, query_valid, key_valid)
    return _divided(_deviation(real_weights(weights, real), real))


def alignment_ratios(
    weights: Tensor,
    sure: Tensor | None = None,
    possible: Tensor | None = None,
    *,
    method: str = "argmax",
    query_valid: Tensor | None = None,
    key_valid: Tensor | None = None,
) -> Tensor:
    """Compute numerator and denominator of everything that is known of an alignment, for each sample and head.

    Sums over samples, divided at the end, are the quantities of a corpus. Besides those of the other functions here,
    ``confidence`` is the mean over target tokens of the largest weight.

    Args:
        weights: Cross-attention weights, rows are target tokens.
        sure: Gold links without doubt; ``None``: there are none to compare with.
        possible: Gold links that may or may not be there.
        method: How links are read off, as in :func:`alignment_links`.
        query_valid: ``True`` for target tokens that may be linked; ``None`` means all.
        key_valid: ``True`` for source tokens that may be linked; ``None`` means all.

    Shape:
        - weights: ``(batch, heads, queries, keys)``
        - sure, possible: bool, ``(batch, queries, keys)``
        - query_valid: ``(batch, queries)``
        - key_valid: ``(batch, keys)``
        - output: ``(batch, heads, quantities, 2)``, float64, along `ALIGNMENT_QUANTITIES`; zero where not defined

    Raises:
        ValueError: If a shape does not fit, ``method`` is another word, or there are possible links but no ``sure``.

    Example:
        >>> ratios = alignment_ratios(torch.eye(2)[None, None], torch.eye(2, dtype=torch.bool)[None])
        >>> ratios[0, 0, ALIGNMENT_QUANTITIES.index("precision")]
        tensor([2., 2.], dtype=torch.float64)
    """
    if sure is None and possible is not None:
        raise ValueError("`possible` needs `sure`: pass the links without doubt, or all of them, as `sure`.")
    check_axes("weights", weights, 4)
    one_of("method", method, LINKING)
    real = real_pairs(weights.shape, weights.device, query_valid, key_valid)
    seen = real_weights(weights, real)
    links = largest_links(seen, method)
    if sure is None:
        gold = [seen.new_zeros(*seen.shape[:2], 2, dtype=torch.float64)] * 3
    else:
        gold = _agreement(alignment_counts(links, sure, possible, query_valid=query_valid, key_valid=key_valid))
    return torch.stack([*gold, _steps(links), _covered(links, real), _deviation(seen, real), _confidence(seen)], dim=2)


def _agreement(counts: Tensor) -> list[Tensor]:
    """Return error rate, precision and recall as pairs, ``(batch, heads, 2)`` each."""
    predicted, sure, both, possible = counts.double().unbind(dim=-1)
    whole = predicted + sure
    pairs = ((whole - both - possible, whole), (possible, predicted), (both, sure))
    return [torch.stack(pair, dim=-1) for pair in pairs]


def _steps(links: Tensor) -> Tensor:
    """Return steps that do not go back, and all steps."""
    places = torch.arange(links.shape[-1], device=links.device, dtype=torch.float32)
    count = count_true(links[..., None, :])  # (batch, heads, queries)
    with full_precision(links.device):  # half precision knows no position above 256
        position = (links.float() @ places) / count.clamp_min(1)
    rows = torch.arange(links.shape[-2], device=links.device).expand_as(count)
    latest = rows.where(count > 0, -1)
    latest = torch.cat([torch.full_like(latest[..., :1], -1), latest[..., :-1]], dim=-1)
    before = latest.cummax(dim=-1).values if latest.shape[-1] else latest  # the linked row before each row
    is_step = (count > 0) & (before >= 0)
    forward = is_step & (position >= position.gather(-1, before.clamp_min(0)))
    return torch.stack([forward.sum(dim=-1), is_step.sum(dim=-1)], dim=-1).double()


def _covered(links: Tensor, real: Tensor) -> Tensor:
    """Return source tokens with a link, and all source tokens."""
    sources = real.any(dim=1)[:, None]  # (batch, 1, keys)
    covered = links.any(dim=2) & sources
    return torch.stack([covered.sum(dim=-1), sources.sum(dim=-1).expand(covered.shape[:2])], dim=-1).double()


def _deviation(seen: Tensor, real: Tensor) -> Tensor:
    """Return the sum of the deviations of source tokens, and the number of source tokens."""
    sources = real.any(dim=1)[:, None]
    deviation = torch.log1p((1 - seen.sum(dim=2).double()) ** 2) * sources
    return torch.stack([deviation.sum(dim=-1), sources.sum(dim=-1).double().expand(deviation.shape[:2])], dim=-1)


def _confidence(seen: Tensor) -> Tensor:
    """Return the sum of the largest weights of rows that attend to something, and the number of these rows."""
    top = seen.amax(dim=-1) if seen.shape[-1] else seen.sum(dim=-1)
    return torch.stack([top.double().sum(dim=-1), (top > 0).sum(dim=-1).double()], dim=-1)


def _divided(pair: Tensor) -> Tensor:
    return pair[..., 0] / pair[..., 1]
