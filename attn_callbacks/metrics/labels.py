"""Metrics that count by label, and say so when a label is out of range."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from attn_callbacks.metrics.accumulator import Accumulator

__all__ = ["LabelAccumulator", "label_vector"]


class LabelAccumulator(Accumulator):
    """Accumulator that remembers the extremes of the labels it was given.

    Looking at labels makes an accelerator's host wait, so there the range is checked once, in `compute`, where all
    processes agree. On the CPU the batch that holds the label raises.
    """

    lowest: Tensor
    highest: Tensor

    def __init__(self, *names: str) -> None:
        super().__init__()
        self._label_names = names
        with torch.inference_mode(False):
            self.add_state("lowest", torch.zeros(len(names), dtype=torch.int64), dist_reduce_fx="min")
            self.add_state("highest", torch.zeros(len(names), dtype=torch.int64), dist_reduce_fx="max")

    @abstractmethod
    def label_limits(self) -> tuple[int, ...]:
        """Return the number of labels of each name."""

    def within(self, labels: Tensor, kept: Tensor) -> Tensor:
        """Note the extremes of the kept labels ``(names, samples)`` and return which samples are kept and in range."""
        labels = labels.where(kept, 0)
        # The appended zeros stand for an empty batch; zero is always in range.
        seen = torch.cat([labels, labels.new_zeros(len(labels), 1)], dim=1)
        lowest, highest = self.writable("lowest"), self.writable("highest")
        lowest.copy_(torch.minimum(lowest, seen.amin(dim=1)))
        highest.copy_(torch.maximum(highest, seen.amax(dim=1)))
        if labels.device.type == "cpu":
            self.check_labels()
        below = [row < limit for row, limit in zip(labels, self.label_limits(), strict=True)]
        return kept & (labels >= 0).all(dim=0) & torch.stack(below).all(dim=0)

    def check_labels(self) -> None:
        """Raise if a label was out of range. Waits for the device."""
        extremes = (self.lowest.tolist(), self.highest.tolist(), self.label_limits())
        for name, low, high, limit in zip(self._label_names, *extremes, strict=True):
            if low < 0 or high >= limit:
                raise ValueError(f"`{name}` must lie between 0 and {limit - 1}, got {low if low < 0 else high}.")


def label_vector(name: str, labels: Tensor, samples: int) -> Tensor:
    """Return ``labels`` as int64 if they are ``samples`` whole numbers."""
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"`{name}` must hold whole-number labels, got {labels.dtype}. Take `argmax` of logits first.")
    if labels.shape != (samples,):
        raise ValueError(f"`{name}` must have shape (samples,) = {(samples,)}, got {tuple(labels.shape)}.")
    return labels.detach().long()
