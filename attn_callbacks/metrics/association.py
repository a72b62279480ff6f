"""Tokens and image regions that go with the error: by the attention they draw, and by being there."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attn_callbacks._checks import at_least, check_axes
from attn_callbacks.metrics.labels import LabelAccumulator, label_vector

__all__ = ["TokenAssociation", "TokenSums", "token_attention"]


class TokenSums(NamedTuple):
    """What `TokenAssociation` computes, for :func:`~attn_callbacks.metrics.candidates.associations` to conclude from.

    Args:
        sums: For wrong and right predictions of each stratum: number of samples that hold the token, sum of
            :func:`token_attention`, sum of its squares; ``(strata, 2, tokens, 3)``, float64.
        samples: Number of samples, ``(strata, 2)``, int64.
    """

    sums: Tensor
    samples: Tensor


class TokenAssociation(LabelAccumulator):
    """Add up the attention on every token id, apart for wrong and right predictions. Needs no annotation.

    Classes are kept apart, as strata: a token that is frequent in a hard class would otherwise be found for that
    alone, and the mean of a class, which would have to be subtracted, is not known before the last batch. Where
    ``num_classes * num_tokens`` exceeds ``max_cells``, classes share a power of two of strata in turn (class 0 with
    class 32 of 32 strata), and what is found may partly be the difference between classes that share one.

    The state holds 48 bytes a cell: 30 000 tokens and 10 classes are 14 MB. An update sorts the keys of each sample and
    waits for no device.

    Args:
        num_tokens: Number of token ids, or of image regions.
        num_classes: Number of classes, at least 2.
        max_cells: Most strata times tokens.

    Raises:
        ValueError: If a size is too small; in `update` if a shape does not fit or (on an accelerator in `compute`) a
            token or target is out of range.
        TypeError: In `update`, if tokens or targets are not whole numbers.

    Example:
        >>> metric = TokenAssociation(num_tokens=3, num_classes=2)
        >>> received, tokens = torch.tensor([[0.2, 0.5, 0.3]]), torch.tensor([[0, 2, 0]])
        >>> metric.update(received, tokens, None, right=torch.tensor([True]), target=torch.tensor([1]))
        >>> sums, samples = metric.compute()
        >>> sums[1, 1]  # class 1, right: half of the attention on two of three tokens, and on one of three
        tensor([[1.0000, 0.4286, 0.1837],
                [0.0000, 0.0000, 0.0000],
                [1.0000, 0.6000, 0.3600]], dtype=torch.float64)
    """

    sums: Tensor
    samples: Tensor

    def __init__(self, num_tokens: int, num_classes: int, max_cells: int = 2**20) -> None:
        super().__init__("tokens", "target")
        self.num_tokens = at_least("num_tokens", num_tokens, 1)
        self.num_classes = at_least("num_classes", num_classes, 2)
        self.max_cells = at_least("max_cells", max_cells, 1)
        self._declare()

    def update(self, received: Tensor, tokens: Tensor, valid: Tensor | None, right: Tensor, target: Tensor) -> None:
        """Add one batch.

        Args:
            received: Attention that each key receives, averaged over queries, heads and layers, ``(batch, keys)``;
                any scale. A sample none of whose valid keys receives any, or any defined, is left out.
            tokens: Id of each key, ``(batch, keys)``; for images, the index of the region.
            valid: ``True`` for the keys that count, ``(batch, keys)``; ``None`` means all. Leave special tokens out:
                what rests on them hides the rest.
            right: ``True`` for samples that are predicted right, ``(batch,)``.
            target: Class of each sample, ``(batch,)``. Samples with a negative target are left out.
        """
        received, valid, target = self._checked(received, tokens, valid, right, target)
        total = received.sum(dim=1)
        counted = (target >= 0) & (total > 0) & total.isfinite()
        known = valid & counted[:, None]
        labels = torch.stack([tokens.detach().long(), target[:, None].expand_as(tokens)]).flatten(1)
        known = self.within(labels, known.flatten()).view_as(known)
        token, attention = token_attention(received, tokens.where(known, self.num_tokens), valid)
        row = (target.where(counted, 0) % self.num_strata) * 2 + right.long()  # (batch,): stratum and outcome
        real = (token >= 0) & (token < self.num_tokens)
        index = (row[:, None] * self.num_tokens + token).where(real, 0).flatten()
        added = torch.stack([torch.ones_like(attention), attention, attention**2], dim=-1).where(real[..., None], 0.0)
        self.writable("sums").view(-1, 3).index_add_(0, index, added.flatten(0, 1))
        self.writable("samples").view(-1).index_add_(0, row, counted.long())

    def grow(self, num_tokens: int) -> None:
        """Make room for more tokens, and keep what was added up, as if it had been so from the start.

        Where processes met different numbers of tokens, let all grow to the largest before they communicate.

        Args:
            num_tokens: Number of token ids, or of image regions; at least the present one.
        """
        sums, samples = self.sums, self.samples
        self.num_tokens = at_least("num_tokens", num_tokens, self.num_tokens)
        self._declare()
        stratum = torch.arange(len(sums), device=sums.device) % self.num_strata
        self.sums[:, :, : sums.shape[2]].index_add_(0, stratum, sums)
        self.samples.index_add_(0, stratum, samples)
        self._computed = None

    def compute(self) -> TokenSums:
        """Return the sums of every token and the number of samples."""
        self.check_labels()
        return TokenSums(self.sums, self.samples)

    def label_limits(self) -> tuple[int, ...]:
        """Return the number of tokens and of classes."""
        return self.num_tokens, self.num_classes

    def _declare(self) -> None:
        most = max(1, self.max_cells // self.num_tokens)
        # The remainder by a power of two can be taken again by a smaller one: that lets a metric grow.
        self.num_strata = self.num_classes if self.num_classes <= most else 1 << (most.bit_length() - 1)
        self.add_zeros("sums", self.num_strata, 2, self.num_tokens, 3)
        self.add_zeros("samples", self.num_strata, 2, dtype=torch.int64)

    def _checked(
        self, received: Tensor, tokens: Tensor, valid: Tensor | None, right: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return attention in float64 without that on invalid keys, the valid keys and the targets."""
        check_axes("received", received, 2)
        if tokens.is_floating_point():  # continuous inputs by mistake: not cast, as labels are
            raise TypeError(
                f"`tokens` must hold whole-number labels, got {tokens.dtype}. Pass the ids, not embeddings."
            )
        valid = torch.ones_like(received, dtype=torch.bool) if valid is None else valid.bool()
        for name, values in (("tokens", tokens), ("valid", valid)):
            if values.shape != received.shape:
                shape, came = tuple(received.shape), tuple(values.shape)
                raise ValueError(f"`{name}` must have shape (batch, keys) = {shape}, got {came}.")
        if right.shape != received.shape[:1]:
            raise ValueError(f"`right` must have shape (batch,) = {(len(received),)}, got {tuple(right.shape)}.")
        return received.detach().double().where(valid, 0.0), valid, label_vector("target", target, len(received))


def token_attention(received: Tensor, tokens: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return how much attention each distinct token of a sample draws, from 0 to 1; one half is chance.

    .. math:: \frac{v}{1 + v}, \qquad v = \frac{\text{mass on the token}}{\text{its share of the valid keys}}

    ``v`` is the mean attention on an occurrence of the token, relative to uniform attention: a token is not found for
    coming often. Its heavy tail is bent because means of few samples are to be compared: of 10 with 300 log-normal
    values (standard deviation 1), all alike, Welch's test at 2 in 10 000 finds 260 in 10 000 different in ``v``, and 7
    in ``v / (1 + v)``.

    Args:
        received: Attention that each key receives, zero for keys that are not valid.
        tokens: Id of each key; those that are not valid carry an id of their own.
        valid: ``True`` for the keys that are tokens.

    Shape:
        - received, tokens, valid: ``(batch, keys)``
        - output: token and attention, ``(batch, keys)`` each, distinct tokens first, in rising order; the remaining
          places hold -1 and 0

    Example:
        >>> token, attention = token_attention(
        ...     torch.tensor([[0.1, 0.6, 0.3]]).double(), torch.tensor([[5, 7, 5]]), torch.ones(1, 3, dtype=torch.bool)
        ... )
        >>> token[0, :2].tolist(), attention[0, :2].tolist()
        ([5, 7], [0.375..., 0.642...])
    """
    ordered, order = tokens.sort(dim=1)
    starts = torch.ones_like(ordered)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    place = starts.cumsum(dim=1) - 1  # of the token of each key among the distinct ones
    mass = torch.zeros_like(received).scatter_add_(1, place, received.gather(1, order))
    count = torch.zeros_like(received).scatter_add_(1, place, torch.ones_like(received))
    token = torch.full_like(ordered, -1).scatter_(1, place, ordered)
    chance = received.sum(dim=1, keepdim=True) * count / valid.sum(dim=1, keepdim=True)
    both = mass + chance
    return token, mass / both.where(both > 0, 1.0)
