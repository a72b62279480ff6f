"""Links between the tokens of two sequences, read off cross-attention and compared with gold links."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attn_callbacks._checks import check_axes, one_of

__all__ = ["ALIGNMENT_COUNTS", "LINKING", "AlignmentScores", "alignment_counts", "alignment_links", "alignment_scores"]

LINKING = ("argmax", "mutual")
"""Ways to read links off weights."""

ALIGNMENT_COUNTS: tuple[str, ...] = ("predicted", "sure", "predicted_sure", "predicted_possible")
"""Names along the last axis of `alignment_counts`, in order: sizes of A, S, A and S, A and P."""


class AlignmentScores(NamedTuple):
    """How well predicted links agree with gold links; NaN where nothing was predicted, or nothing is known.

    Args:
        error_rate: Alignment error rate, from 0 for perfect to 1; lower is better.
        precision: Share of the predicted links that are possible.
        recall: Share of the sure links that were predicted.
    """

    error_rate: Tensor
    precision: Tensor
    recall: Tensor


def alignment_links(
    weights: Tensor, *, method: str = "argmax", query_valid: Tensor | None = None, key_valid: Tensor | None = None
) -> Tensor:
    """Link target tokens to the source tokens that they attend to most.

    ``"argmax"`` gives each target token one link, to the source token of its largest weight. ``"mutual"`` keeps of
    these the links that are also the largest weight of their source token: fewer and surer ones. The first of equal
    weights wins. Padding, and special tokens that must not be linked (the end of a sentence collects much attention),
    are left out before the largest weight is looked for. One pass over the weights, ``"mutual"`` two.

    Args:
        weights: Cross-attention weights, rows are target tokens; a row of zeros has no link, and NaN is zero.
        method: ``"argmax"`` or ``"mutual"``.
        query_valid: ``True`` for target tokens that may be linked; ``None`` means all.
        key_valid: ``True`` for source tokens that may be linked; ``None`` means all.

    Shape:
        - weights: ``(batch, heads, queries, keys)``
        - query_valid: ``(batch, queries)``
        - key_valid: ``(batch, keys)``
        - output: bool, ``(batch, heads, queries, keys)``

    Raises:
        ValueError: If a shape does not fit or ``method`` is another word.

    Example:
        >>> weights = torch.tensor([[[[0.9, 0.1], [0.6, 0.4]]]])
        >>> alignment_links(weights)[0, 0].int()
        tensor([[1, 0],
                [1, 0]], dtype=torch.int32)
        >>> alignment_links(weights, method="mutual")[0, 0].int()
        tensor([[1, 0],
                [0, 0]], dtype=torch.int32)

    References:
        Och and Ney, "A Systematic Comparison of Various Statistical Alignment Models", 2003 (intersection of the two
        directions, from one map here).
    """
    one_of("method", method, LINKING)
    check_axes("weights", weights, 4)
    real = real_pairs(weights.shape, weights.device, query_valid, key_valid)
    return largest_links(real_weights(weights, real), method)


def alignment_counts(
    links: Tensor,
    sure: Tensor,
    possible: Tensor | None = None,
    *,
    query_valid: Tensor | None = None,
    key_valid: Tensor | None = None,
) -> Tensor:
    """Count the predicted links of every sample and head, and how many of them are gold.

    Add counts up before you divide (:func:`alignment_scores`): the error rate of a corpus is not the mean over its
    sentences. A sample without any gold link was not annotated, and all its counts are zero.

    Args:
        links: Predicted links, as from :func:`alignment_links`. Any others do as well.
        sure: Gold links without doubt.
        possible: Gold links that may or may not be there; the sure ones are possible, too. ``None``: only those are.
        query_valid: ``True`` for target tokens that may be linked, as for :func:`alignment_links`.
        key_valid: ``True`` for source tokens that may be linked. Gold links of others do not count.

    Shape:
        - links: bool, ``(batch, heads, queries, keys)``
        - sure, possible: bool, ``(batch, queries, keys)``
        - output: ``(batch, heads, 4)``, int64, along `ALIGNMENT_COUNTS`

    Raises:
        ValueError: If a shape does not fit.

    Example:
        >>> links, sure, possible = (torch.zeros(1, 3, 2, dtype=torch.bool) for _ in range(3))
        >>> links[0, [0, 1, 2], [0, 0, 1]] = sure[0, [0, 1], [0, 1]] = possible[0, 2, 1] = True
        >>> alignment_counts(links[:, None], sure, possible)
        tensor([[[3, 2, 1, 2]]])
    """
    check_axes("links", links, 4)
    real = real_pairs(links.shape, links.device, query_valid, key_valid)
    sure = _gold("sure", sure, links, real)
    either = sure if possible is None else sure | _gold("possible", possible, links, real)
    annotated = either.flatten(1).any(dim=1)[:, None, None, None]
    predicted = links.bool() & real[:, None] & annotated
    sets = (predicted, sure[:, None], predicted & sure[:, None], predicted & either[:, None])
    return torch.stack([count_true(found).expand(predicted.shape[:2]) for found in sets], dim=-1)


def alignment_scores(counts: Tensor) -> AlignmentScores:
    r"""Compute alignment error rate, precision and recall from counts of links.

    .. math::
        \mathrm{AER} = 1 - \frac{|A \cap S| + |A \cap P|}{|A| + |S|}, \qquad
        \text{precision} = \frac{|A \cap P|}{|A|}, \qquad \text{recall} = \frac{|A \cap S|}{|S|}

    Where all gold links are sure, the error rate is one minus the F1 score.

    Args:
        counts: What :func:`alignment_counts` returned, summed over all samples.

    Shape:
        - counts: ``(..., 4)``
        - output: ``(...)`` each, float64

    Raises:
        ValueError: If the last axis has not four entries.

    Example:
        >>> alignment_scores(torch.tensor([3, 2, 1, 2])).error_rate
        tensor(0.4000, dtype=torch.float64)

    References:
        Och and Ney, "Improved Statistical Alignment Models", 2000, section 4.
    """
    if counts.ndim == 0 or counts.shape[-1] != len(ALIGNMENT_COUNTS):
        raise ValueError(f"`counts` must have shape (..., {len(ALIGNMENT_COUNTS)}), got {tuple(counts.shape)}.")
    predicted, sure, both, possible = counts.double().unbind(dim=-1)
    return AlignmentScores(1 - (both + possible) / (predicted + sure), possible / predicted, both / sure)


def largest_links(weights: Tensor, method: str) -> Tensor:
    """Do what `alignment_links` does, for weights that are zero wherever nothing may be linked."""
    links = _largest(weights, dim=-1)
    return links if method == "argmax" else links & _largest(weights, dim=-2)


def real_weights(weights: Tensor, real: Tensor) -> Tensor:
    """Return the weights between real tokens, float32, without their graph."""
    return weights.detach().float().masked_fill(~real[:, None], 0.0).nan_to_num(0.0)


def count_true(marks: Tensor) -> Tensor:
    """Return how many of the last two axes are ``True``, int64."""
    # several times as fast on a CPU as the sum of booleans, each of which is widened first
    return marks.view(torch.uint8).sum(dim=-1, dtype=torch.int32).sum(dim=-1)


def real_pairs(shape: torch.Size, device: torch.device, query_valid: Tensor | None, key_valid: Tensor | None) -> Tensor:
    """Return ``(batch, queries, keys)``: ``True`` where both tokens may be linked, after checking the masks' shapes."""
    batch, _, queries, keys = shape
    real = torch.ones(batch, queries, keys, dtype=torch.bool, device=device)
    for name, valid, size, axis in (("query_valid", query_valid, queries, 2), ("key_valid", key_valid, keys, 1)):
        if valid is None:
            continue
        if valid.shape != (batch, size):
            kind = name.replace("query", "queries").replace("key", "keys").removesuffix("_valid")
            raise ValueError(f"`{name}` must have shape (batch, {kind}) = {(batch, size)}, got {tuple(valid.shape)}.")
        real = real & valid.to(device).bool().unsqueeze(axis)
    return real


def _gold(name: str, gold: Tensor, links: Tensor, real: Tensor) -> Tensor:
    """Return gold links between real tokens, ``(batch, queries, keys)``."""
    if gold.shape != links[:, 0].shape:
        expected, got = tuple(links[:, 0].shape), tuple(gold.shape)
        raise ValueError(f"`{name}` must have shape (batch, queries, keys) = {expected}, got {got}.")
    return gold.to(links.device).bool() & real


def _largest(weights: Tensor, dim: int) -> Tensor:
    """Mark the largest positive weight along an axis, the first of several."""
    top, place = weights.max(dim=dim, keepdim=True)
    return torch.zeros_like(weights, dtype=torch.bool).scatter_(dim, place, top > 0)
