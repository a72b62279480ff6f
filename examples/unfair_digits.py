"""scikit-learn's digits, made unfair in three ways; the tests are fair.

- *Long tail*: 100 training images of the most frequent digit, 4 of the rarest.
- *Colour*: five or more? In training the colour tells, in the test it does not.
- *Decoy*: in training a grey corner patch gives the digit away, in the test it does not.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Data", "coloured", "decoyed", "long_tail", "read_digits"]


class Data(NamedTuple):
    """Samples; each field has one row a sample. ``mask`` marks pixels that must not count."""

    images: Tensor  # (samples, channels, height, width)
    target: Tensor
    group: Tensor
    mask: Tensor  # the shape of `images`

    def rows(self, rows: Tensor | slice) -> Data:
        """Return some of the samples."""
        return Data(*(field[rows] for field in self))


def read_digits() -> Data:
    """Return the 1,797 digits, 8x8 and in [0, 1], in a fixed random order."""
    raw = load_digits()
    order = torch.randperm(len(raw.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(raw.images, dtype=torch.float32)[order, None] / 16
    target = torch.tensor(raw.target)[order]
    return Data(images, target, torch.zeros_like(target), torch.zeros_like(images, dtype=torch.bool))


def long_tail(digits: Data, seed: int) -> tuple[Data, Data, list[int]]:
    """Keep 100 images of one class down to 4 of another, and add noise; test on the rest."""
    draw = torch.Generator().manual_seed(seed)
    counts = torch.logspace(2, 0.6, 10).round().long()[torch.randperm(10, generator=draw)]
    own = [(digits.target == label).nonzero()[:, 0] for label in range(10)]
    train = torch.cat([rows[:count] for rows, count in zip(own, counts, strict=True)])
    test = torch.cat([rows[100:] for rows in own])
    noisy = digits._replace(images=digits.images + 0.35 * torch.randn(digits.images.shape, generator=draw))
    return noisy.rows(train), noisy.rows(test), counts.tolist()


def coloured(digits: Data, share: float, seed: int) -> Data:
    """Paint images in one of two colours, which is that of their half of the digits in ``share`` of the cases."""
    draw = torch.Generator().manual_seed(seed)
    high = (digits.target >= 5).long()
    colour = torch.where(torch.rand(len(high), generator=draw) < share, high, 1 - high)
    images = digits.images * F.one_hot(colour, 2)[:, :, None, None]
    return Data(images, high, 2 * high + colour, torch.zeros_like(images, dtype=torch.bool))


def decoyed(digits: Data, honest: bool, seed: int) -> Data:
    """Put a patch in a random corner; its brightness is that of the digit, or random where it is honest."""
    draw = torch.Generator().manual_seed(seed)
    samples = len(digits.target)
    shown = torch.randint(10, (samples,), generator=draw) if honest else digits.target
    row, column = 10 * torch.randint(2, (2, samples, 1, 1), generator=draw)
    place = torch.arange(12)
    mask = ((place[:, None] // 2 * 2 == row) & (place // 2 * 2 == column))[:, None]
    patch = (1 - 0.1 * shown)[:, None, None, None] * mask
    return digits._replace(images=F.pad(digits.images, (2, 2, 2, 2)) + patch, mask=mask)
