"""Where in the sequence each class looks: mean attention by relative position, and how far classes lie apart."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from attn_callbacks._checks import at_least, check_axes
from attn_callbacks.functional.divergence import pairwise_jensen_shannon
from attn_callbacks.metrics.labels import LabelAccumulator, label_vector
from attn_callbacks.metrics.moments import mean_and_error

__all__ = ["ClassAttention", "ClassAttentionResult", "class_divergence", "position_bins"]


class ClassAttentionResult(NamedTuple):
    """What `ClassAttention` computes.

    Args:
        distribution: Mean share of each bin, ``(classes, bins)``; rows sum to one, NaN without a sample. float64.
        error: Standard error of each share, ``(classes, bins)``, NaN below two samples. float64.
        support: Number of samples, ``(classes,)``. int64.
    """

    distribution: Tensor
    error: Tensor
    support: Tensor


class ClassAttention(LabelAccumulator):
    """Average the attention that positions receive, for the samples of each class.

    Every sample counts the same, whatever its length: its valid tokens are stretched over ``bins`` places between the
    first and the last. For images of one size, take as many bins as there are patches.

    Args:
        num_classes: Number of classes, at least 2.
        bins: Places between start and end of a sequence.

    Raises:
        ValueError: If a size is too small; in `update` if a shape does not fit or (on an accelerator in `compute`) a
            target is out of range.
        TypeError: In `update`, if targets are not whole numbers.

    Example:
        >>> metric = ClassAttention(num_classes=2, bins=2)
        >>> received = torch.tensor([[0.6, 0.2, 0.1, 0.1], [0.5, 0.25, 0.25, 0.0]])
        >>> metric.update(received, torch.tensor([[True] * 4, [True] * 3 + [False]]), target=torch.tensor([0, 1]))
        >>> metric.compute().distribution
        tensor([[0.8000, 0.2000],
                [0.6250, 0.3750]], dtype=torch.float64)
    """

    sums: Tensor
    support: Tensor

    def __init__(self, num_classes: int, bins: int = 32) -> None:
        super().__init__("target")
        self.num_classes = at_least("num_classes", num_classes, 2)
        self.num_bins = at_least("bins", bins, 2)
        self.add_zeros("sums", num_classes, bins, 2)  # share, share ** 2
        self.add_zeros("support", num_classes, dtype=torch.int64)

    def update(self, received: Tensor, valid: Tensor | None, target: Tensor) -> None:
        """Add one batch.

        Args:
            received: Attention that each key receives, averaged over queries, heads and layers, ``(batch, keys)``;
                any scale. A sample none of whose valid keys receives any, or any defined, is left out.
            valid: ``True`` for the keys that are tokens, ``(batch, keys)``; ``None`` means all. Leave special tokens
                out: what rests on them hides the rest.
            target: Class of each sample, ``(batch,)``. Samples with a negative target are left out.
        """
        shares = position_bins(received.detach(), valid, self.num_bins)
        target = label_vector("target", target, len(received))
        counted = self.within(target[None], (target >= 0) & shares.isfinite().all(dim=1))
        added = torch.stack([shares, shares**2], dim=-1).where(counted[:, None, None], 0.0)
        index = target.where(counted, 0)
        self.writable("sums").index_add_(0, index, added)
        self.writable("support").index_add_(0, index, counted.long())

    def compute(self) -> ClassAttentionResult:
        """Return mean distribution, its standard error and support of every class."""
        self.check_labels()
        return ClassAttentionResult(*mean_and_error(self.support[:, None], *self.sums.unbind(dim=-1)), self.support)

    def label_limits(self) -> tuple[int, ...]:
        """Return the number of classes."""
        return (self.num_classes,)


def position_bins(received: Tensor, valid: Tensor | None, bins: int) -> Tensor:
    """Spread the attention that each sample's valid keys receive over places between the first and the last of them.

    Each of ``n`` valid keys covers ``1 / n`` of the way and gives its share to the bins it overlaps, in proportion:
    nothing is lost, and a sequence shorter than the bins is no more ragged than it is. Invalid keys may lie anywhere.

    Args:
        received: Attention that each key receives, at least zero.
        valid: ``True`` for the keys that are tokens; ``None`` means all.
        bins: Number of places.

    Shape:
        - received, valid: ``(batch, keys)``
        - output: ``(batch, bins)``, float64; rows sum to one, or are NaN where no valid key receives anything

    Raises:
        ValueError: If a shape does not fit.

    Example:
        >>> position_bins(torch.tensor([[0.2, 0.6, 0.2]]), None, bins=2)
        tensor([[0.5000, 0.5000]], dtype=torch.float64)
    """
    check_axes("received", received, 2)
    valid = torch.ones_like(received, dtype=torch.bool) if valid is None else valid.bool()
    if valid.shape != received.shape:
        shape, came = tuple(received.shape), tuple(valid.shape)
        raise ValueError(f"`valid` must have shape (batch, keys) = {shape}, got {came}.")
    # A key of no weight in front, so that there is a key before the first and an empty batch has one as well.
    mass = F.pad(received.double().where(valid, 0.0), (1, 0))
    order = F.pad(valid.long(), (1, 0)).cumsum(dim=1)  # how many valid keys up to and with this one
    below, length = mass.cumsum(dim=1), order[:, -1:]
    reach = torch.arange(1, bins, device=received.device) * length  # of the inner edges, in keys times bins
    whole, part = reach // bins, (reach % bins).double() / bins
    last = torch.searchsorted(order, whole)  # the key that completes `whole` valid ones
    following = torch.searchsorted(order, whole + 1).clamp_max(received.shape[1])
    up_to = below.gather(1, last) + part * mass.gather(1, following)  # (batch, bins - 1)
    total = below[:, -1:]
    edges = torch.cat([torch.zeros_like(total), up_to, total], dim=1)
    return edges.diff(dim=1).clamp_min(0.0) / total.where(total > 0, torch.nan)


def class_divergence(result: ClassAttentionResult, min_support: int = 20, corrected: bool = True) -> Tensor:
    r"""Measure the Jensen-Shannon distance between the mean attention of all pairs of classes.

    Means of few samples lie apart by chance, the more so the more bins there are. The expected amount of that, to
    second order in the standard errors, is taken off the squared distance:

    .. math:: \frac{1}{4 \ln 2} \sum_i \frac{q_i}{p_i (p_i + q_i)} \mathrm{Var}(p_i)
              + \frac{p_i}{q_i (p_i + q_i)} \mathrm{Var}(q_i)

    so that classes that attend alike show no distance on average, rather than one that shrinks as data grow.

    Args:
        result: What `ClassAttention` computed.
        min_support: Samples below which a class is not compared; the correction needs two.
        corrected: Take off what chance adds; ``False`` gives the distance of the means as they are.

    Shape:
        - output: ``(classes, classes)``, float64 in [0, 1], symmetric; NaN for a class below ``min_support``

    Raises:
        ValueError: If ``min_support`` is below 1.

    Example:
        >>> shares = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]).double()
        >>> class_divergence(ClassAttentionResult(shares, torch.zeros_like(shares), torch.tensor([30, 30, 5])))
        tensor([[0., 1., nan],
                [1., 0., nan],
                [nan, nan, nan]], dtype=torch.float64)
    """
    at_least("min_support", min_support, 1)
    enough = result.support >= min_support
    squared = pairwise_jensen_shannon(result.distribution) ** 2
    if corrected:
        chance = _chance(result.distribution, result.error**2)
        squared = (squared - (chance + chance.mT) / (4 * math.log(2))).clamp_min(0.0)
    return squared.sqrt().where(enough & enough[:, None], torch.nan)


def _chance(distribution: Tensor, variance: Tensor) -> Tensor:
    """Return the part of each row's class in the expected divergence by chance, ``(classes, classes)``."""
    parts = torch.empty_like(distribution[:, :1] * distribution[:, 0])
    for own, p, spread in zip(parts, distribution, variance, strict=True):
        size = p * (p + distribution)  # (classes, bins); zero where this class never looks, which has no spread
        own.copy_((distribution * spread / size.masked_fill(size == 0, 1.0)).sum(dim=1))
    return parts
