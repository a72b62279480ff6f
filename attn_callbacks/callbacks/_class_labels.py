"""Labels of classes: which samples count, and what is said of labels that are no class."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["class_labels", "label_complaint", "pooled_strangers"]


def class_labels(target: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Return labels as whole numbers, and what is known of those that are no class. Waits for no device.

    A label outside of the classes would end a run on CUDA, and a fraction be cut off: both count as none.

    Args:
        target: Labels; negative for samples that do not count.
        classes: Number of classes.

    Shape:
        - target: ``(samples,)``, any type
        - output: int64 ``(samples,)``, -1 for samples that do not count; float64 ``(3,)``: how many labels are no
          class, the lowest and the highest of them

    Example:
        >>> class_labels(torch.tensor([0.0, 1.0, 2.0, 0.5, -100.0]), classes=2)
        (tensor([ 0,  1, -1, -1, -1]), tensor([2.0000, 0.5000, 2.0000], dtype=torch.float64))
    """
    wide = target.detach().double()
    known = (wide == wide.floor()) & (wide < classes)
    end = wide.new_full((1,), torch.inf)  # there may be no sample
    lowest = torch.cat([wide.masked_fill(known, torch.inf), end]).amin()
    highest = torch.cat([wide.masked_fill(known, -torch.inf), -end]).amax()
    strangers = torch.stack([(~known).sum().double(), lowest, highest])
    return wide.where(known, -1.0).clamp_min(-1.0).long(), strangers


def pooled_strangers(parts: Sequence[Tensor]) -> Tensor:
    """Combine what is known of labels that are no class, of several batches or processes."""
    count, lowest, highest = torch.stack(list(parts)).unbind(dim=1)
    return torch.stack([count.sum(), lowest.amin(), highest.amax()])


def label_complaint(owner: str, strangers: Tensor, classes: int) -> str | None:
    """Return what to say of labels that are no class; ``None`` if there are none. Waits for the device.

    Args:
        owner: Who says so.
        strangers: Output of `class_labels` or `pooled_strangers`.
        classes: Number of classes.
    """
    count, lowest, highest = strangers.tolist()
    if not count:
        return None
    got = f"{lowest:g}" if lowest == highest else f"values from {lowest:g} to {highest:g}"
    return (
        f"`{owner}` left out {count:.0f} samples whose labels are no class: got {got}. Labels must be whole numbers "
        f"from 0 to {classes - 1}, one for each of the {classes} logits, or negative for samples that do not count."
    )
