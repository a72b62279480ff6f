"""Metrics that count by label, and say so when a label is out of range."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

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
                raise ValueError(_out_of_range(name, limit, low if low < 0 else high))


def label_vector(name: str, labels: Tensor | Sequence[float], samples: int) -> Tensor:
    """Return ``labels`` as int64 if they are ``samples`` whole numbers, also such as 1.0, or a list of them.

    A fraction is only looked for on the CPU: elsewhere the host would wait.

    Raises:
        TypeError: If they are not whole numbers.
        ValueError: If there are not as many as samples.
    """
    values = (labels if isinstance(labels, Tensor) else _from_list(name, labels)).detach()
    if values.shape != (samples,):
        raise ValueError(f"`{name}` must have shape (samples,) = {(samples,)}, got {tuple(values.shape)}.")
    wrong: object = values.dtype if values.is_complex() else None
    if values.is_floating_point() and values.device.type == "cpu":
        broken = values[values.frac() != 0]
        wrong = broken[0].item() if len(broken) else None
    if wrong is not None:
        raise TypeError(
            f"`{name}` must hold whole-number labels, got {wrong}. Take `argmax(dim=1)` of the scores of classes, or "
            "`(probability > 0.5).long()` of one probability."
        )
    return values.long()


def _from_list(name: str, labels: Sequence[float]) -> Tensor:
    try:
        return torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        first = labels[0] if isinstance(labels, (list, tuple)) and labels else labels
        wrong = f"strings such as {first!r}" if isinstance(first, str) else type(first).__name__
        raise TypeError(
            f"`{name}`: expected integers, got {wrong}. Number them, e.g. `{name}s.index(name)` with a list of names."
        ) from None


def _out_of_range(name: str, limit: int, got: int) -> str:
    if name != "group" or got < 0:
        return f"`{name}` must lie between 0 and {limit - 1}, got {got}."
    there = "there is 1 group" if limit == 1 else f"there are {limit} groups"
    return f"`group` must lie between 0 and {limit - 1}, got {got}: {there}. Pass `groups=` names for all."
