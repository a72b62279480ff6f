"""What the bias monitor saw on one validation pass: counts, and every rate that follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from attn_callbacks._checks import at_least
from attn_callbacks._plain import plain
from attn_callbacks.bias._extremes import DRAWN, SCORED, Extremes
from attn_callbacks.bias._held import hold
from attn_callbacks.bias._rates import NO_GROUPS
from attn_callbacks.bias.calibration import Calibration
from attn_callbacks.bias.candidate import Candidate
from attn_callbacks.bias.diagnosis import diagnose
from attn_callbacks.bias.finding import Finding
from attn_callbacks.bias.reliance import Reliance
from attn_callbacks.bias.share import AttentionShare
from attn_callbacks.bias.text import summary_text

__all__ = ["BiasReport"]

_GIVEN = ("epoch", "step", "min_support", "class_names", "group_names", "counts", "train_counts", "divergence")
_RATES = (
    *("support", "class_support", "recall", "recall_error", "precision", "f1", "accuracy", "label_prior"),
    *("prediction_prior", "cell_recall", "group_support", "group_accuracy", "group_accuracy_error"),
    *DRAWN,
)


@dataclass(frozen=True, eq=False)
class BiasReport(Extremes):
    """Validation counts by group, class and prediction, and the rates and findings that follow from them.

    Counts are held as int64 and rates computed as float64, both on the CPU: equal counts give equal numbers on every
    device. A rate without support is NaN, never 0 and never "fair". *Estimable* is what has ``min_support`` samples;
    only that enters a worst case, a gap or a finding.

    Args:
        epoch: Epoch of the validation pass.
        step: Optimiser steps taken before it.
        counts: Confusion counts: group, target, predicted.
        class_names: Name of each class.
        group_names: Name of each group; ``("all",)`` where samples have no groups.
        train_counts: Number of samples of each group and class that training was fed so far.
        attention: Attention on token sets, by name, where they are annotated: ``"relevance"``, ``"spurious"``, others.
        min_support: Least number of samples behind a comparison, at least 1.
        reliance: Outcomes that change when a token set is shuffled across samples, by name of the set.
        calibration: Calibration and loss by class and group.
        divergence: Jensen-Shannon distance between the mean attention of any two classes, in [0, 1].
        candidates: Tokens or image regions that may be spurious, the strongest first.

    Shape:
        - counts: ``(groups, classes, classes)``
        - train_counts: ``(groups, classes)``
        - divergence: ``(classes, classes)``

    Raises:
        ValueError: If shapes and names do not fit together, or ``min_support`` is below 1.

    Example:
        >>> counts = torch.tensor([[[90, 10], [40, 60]]])
        >>> report = BiasReport(epoch=0, step=100, counts=counts, class_names=("negative", "positive"))
        >>> report.recall
        tensor([0.9000, 0.6000], dtype=torch.float64)
        >>> [(finding.kind, finding.where, round(finding.size, 2)) for finding in report.findings]
        [('class', 'positive', 0.3)]
    """

    epoch: int
    step: int
    counts: Tensor
    class_names: tuple[str, ...]
    group_names: tuple[str, ...] = NO_GROUPS
    train_counts: Tensor | None = None
    attention: Mapping[str, AttentionShare] = field(default_factory=dict)
    min_support: int = 20
    reliance: Mapping[str, Reliance] = field(default_factory=dict)
    calibration: Calibration | None = None
    divergence: Tensor | None = None
    candidates: tuple[Candidate, ...] = ()

    def __post_init__(self) -> None:
        at_least("min_support", self.min_support, 1)
        cells = (len(self.group_names), len(self.class_names))
        self._check("counts", self.counts, (*cells, cells[1]), "(groups, classes, classes)")
        self._check("train_counts", self.train_counts, cells, "(groups, classes)")
        self._check("divergence", self.divergence, (cells[1], cells[1]), "(classes, classes)")
        for name, share in self.attention.items():
            self._check(f"attention[{name!r}]", share.mass, cells[1:], "(classes,)")
        for name, reliance in self.reliance.items():
            self._check(f"reliance[{name!r}]", reliance.class_support, cells[1:], "(classes,)")
        if self.calibration is not None:
            self._check("calibration", self.calibration.support, cells, "(groups, classes)")
        hold(self, "counts", torch.int64)
        hold(self, "train_counts", torch.int64)
        hold(self, "divergence", torch.float64)
        object.__setattr__(self, "attention", dict(self.attention))
        object.__setattr__(self, "reliance", dict(self.reliance))
        object.__setattr__(self, "candidates", tuple(self.candidates))

    @cached_property
    def findings(self) -> tuple[Finding, ...]:
        """What is beyond the dead band (0.02) and beyond chance, the largest first.

        Chance is corrected for the number of classes, groups, cells or sets that were compared: among the classes, say,
        of a model without bias, at most about one report in twenty has a finding
        (:func:`~attn_callbacks.bias.diagnosis.diagnose`).
        """
        return diagnose(self)

    def to_dict(self) -> dict[str, object]:
        """Return everything as plain numbers, strings, lists and dicts that JSON can hold; NaN becomes ``None``."""
        values: dict[str, object] = {name: getattr(self, name) for name in (*_GIVEN, *_RATES)}
        values["intervals"] = {name: self.interval(name) for name in (*SCORED, *DRAWN)}
        for name in ("prior_shift", "demographic_parity", "equalised_odds"):
            values[name] = getattr(self, name).to_dict()
        for name in ("attention", "reliance"):
            values[name] = {part: figures.to_dict() for part, figures in getattr(self, name).items()}
        values["calibration"] = None if self.calibration is None else self.calibration.to_dict()
        values["candidates"] = [candidate.to_dict() for candidate in self.candidates]
        values["findings"] = [asdict(finding) for finding in self.findings]
        return {name: plain(value) for name, value in values.items()}

    def summary(self) -> str:
        """Return a text that reads well in a terminal and, as Markdown, in TensorBoard."""
        return summary_text(self)

    def _check(self, name: str, tensor: Tensor | None, expected: tuple[int, ...], axes: str) -> None:
        if tensor is not None and tuple(tensor.shape) != expected:
            raise ValueError(
                f"`{name}` must have shape {axes} = {expected}, got {tuple(tensor.shape)}: `group_names` has "
                f"{len(self.group_names)} names, `class_names` {len(self.class_names)}."
            )
