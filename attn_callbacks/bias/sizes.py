"""The size of what a finding was about in any report, whether or not it is a finding there."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from attn_callbacks.bias.rates import rate_error, shortfall

if TYPE_CHECKING:
    from attn_callbacks.bias.report import BiasReport

__all__ = ["Measured", "measure", "size_of"]


class Measured(NamedTuple):
    """A size and its standard error."""

    size: float
    error: float


def size_of(report: BiasReport, key: tuple[str, str]) -> float | None:
    """Return how large a bias is in a report, also where it is no finding; ``None`` where it was not measured.

    Args:
        report: The report.
        key: Kind and place, as in :attr:`attn_callbacks.bias.Finding.key`.

    Example:
        >>> import torch
        >>> from attn_callbacks.bias import BiasReport
        >>> report = BiasReport(0, 0, torch.tensor([[[90, 10], [11, 89]]]), ("negative", "positive"))
        >>> report.findings, round(size_of(report, ("class", "positive")), 2), size_of(report, ("feature", "spurious"))
        ((), 0.01, None)
    """
    found = measure(report, key)
    return None if found is None else found.size


def measure(report: BiasReport, key: tuple[str, str]) -> Measured | None:
    """Return size and standard error of a bias in a report; ``None`` where it was not measured.

    Args:
        report: The report.
        key: Kind and place.
    """
    kind, where = key
    reader = {"class": _of_class, "group": _of_group, "feature": _of_feature, "attention": _of_attention}.get(kind)
    found = None if reader is None else reader(report, where)
    return None if found is None or not math.isfinite(found.size) else found


def _of_class(report: BiasReport, where: str) -> Measured | None:
    if where not in report.class_names:
        return None
    return _short(report.recall, report.class_support, report.min_support, report.class_names.index(where))


def _of_group(report: BiasReport, where: str) -> Measured | None:
    if where in report.group_names:
        place = report.group_names.index(where)
        return _short(report.group_accuracy, report.group_support, report.min_support, place)
    for group, group_name in enumerate(report.group_names):
        for label, class_name in enumerate(report.class_names):
            if where == f"{group_name}, {class_name}":
                return _short(report.cell_recall[:, label], report.support[:, label], report.min_support, group)
    return None


def _of_feature(report: BiasReport, where: str) -> Measured | None:
    reliance = report.reliance.get(where)
    if reliance is None or reliance.support < report.min_support:
        return None
    return Measured(reliance.changed, reliance.changed_error)


def _of_attention(report: BiasReport, where: str) -> Measured | None:
    for name, share in report.attention.items():
        for label, class_name in enumerate(report.class_names):
            if where == f"{name}, {class_name}" and share.support[label] >= report.min_support:
                above = float(share.mass[label] - share.chance[label])
                return Measured(-above if name == "relevance" else above, float(share.mass_error[label]))
    return None


def _short(rates: Tensor, support: Tensor, minimum: int, place: int) -> Measured:
    size, error = shortfall(rates, rate_error(rates, support), support >= minimum)
    return Measured(float(size[place]), float(error[place]))
