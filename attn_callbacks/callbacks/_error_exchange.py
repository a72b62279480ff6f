"""What the processes of a run know together of a validation's errors, before anybody else's code runs on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from attn_callbacks.callbacks._class_labels import pooled_strangers
from attn_callbacks.callbacks._error_gallery import Entry, WorstSamples, worst_of_all
from attn_callbacks.callbacks._error_sums import ErrorSums
from attn_callbacks.callbacks._guard import message
from attn_callbacks.callbacks._processes import from_all_processes
from attn_callbacks.functional.effect_size import Moments

__all__ = ["Counts", "Known", "count_samples", "exchanged", "told"]


class Counts(NamedTuple):
    """Samples of one process, on the device.

    Args:
        samples: How many by class and outcome, ``(classes, 2)``, wrong ones first.
        strangers: What is known of labels that are no class, ``(3,)``; see `class_labels`.
    """

    samples: Tensor
    strangers: Tensor

    def plus(self, others: Counts) -> Counts:
        """Return the counts of both."""
        return Counts(self.samples + others.samples, pooled_strangers([self.strangers, others.strangers]))


class Known(NamedTuple):
    """The same on all processes, on the CPU.

    Args:
        layers: Names of the layers.
        sums: ``(layers, heads, statistics, classes, 2)``.
        counts: Of all samples.
        worst: Samples of each gallery.
    """

    layers: tuple[str, ...]
    sums: Moments
    counts: Counts
    worst: dict[str, list[Entry]]


def count_samples(group: Tensor, right: Tensor, classes: int, strangers: Tensor) -> Counts:
    """Count samples ``(samples,)`` by class and outcome, without those of a negative ``group``."""
    counts = torch.zeros(classes, 2, dtype=torch.int64, device=group.device)
    counts.view(-1).index_add_(0, 2 * group.clamp_min(0) + right.long(), (group >= 0).long())
    return Counts(counts, strangers)


def exchanged(
    sums: ErrorSums,
    counts: Counts | None,
    galleries: Mapping[str, WorstSamples],
    device: torch.device,
    *,
    failure: str | None,
    is_distributed: bool,
) -> Known | None:
    """Return what all processes know together; ``None`` if none saw anything. Every process must call it.

    What may fail here is done before the first exchange, which tells it to all: none waits for one that has left.

    Args:
        sums: Statistics of heads.
        counts: Of samples; ``None`` where there were none.
        galleries: By name, the same names on all processes.
        device: Where this process computes.
        failure: Why this process could not measure all of its data, if so.
        is_distributed: There are other processes.

    Raises:
        RuntimeError: On all processes, if one of them failed.
    """
    own: tuple[Tensor, Tensor] | None = None
    entries: dict[str, list[Entry]] = {}
    try:
        own = None if counts is None else (counts.samples.cpu(), counts.strangers.cpu())
        entries = {name: gallery.entries() for name, gallery in galleries.items()}
    except Exception as error:  # noqa: BLE001
        failure = failure or told(error)
    found = sums.conclude(device, failure=failure)
    if found is None:
        return None
    shares = [share for share in from_all_processes(own, is_distributed=is_distributed) if share is not None]
    worst = {
        name: worst_of_all(entries[name], gallery.most, is_distributed=is_distributed)
        for name, gallery in galleries.items()
    }
    samples, strangers = zip(*shares, strict=True)
    return Known(*found, Counts(torch.stack(samples).sum(dim=0), pooled_strangers(strangers)), worst)


def told(error: Exception) -> str:
    """Return an error as other processes are told of it."""
    return f"{type(error).__name__}: {message(error)}"
