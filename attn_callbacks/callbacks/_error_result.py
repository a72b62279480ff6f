"""What ErrorAnalysis found: where heads attend differently on mistakes, and the samples that went most wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attn_callbacks._plain import plain
from attn_callbacks.bias.corrections import holm
from attn_callbacks.functional.effect_size import EffectSize, Moments, effect_size
from attn_callbacks.metrics.moments import mean_and_error

__all__ = ["ErrorAnalysisResult", "HeadDifference", "WrongSample", "conclude_errors"]

LEVEL = 0.05
"""Share of validations that may report a head by chance."""


@dataclass(frozen=True)
class HeadDifference:
    """One statistic of one head that differs between wrong and right samples beyond chance.

    Args:
        layer: Name of the layer.
        head: Number of the head.
        statistic: Name of the statistic.
        wrong: Mean over wrong samples.
        right: Mean over right samples.
        g: Difference in standard deviations (Hedges' g).
        low: Lower end of its interval of 95%.
        high: Upper end.
        p_value: Corrected for all heads and statistics.
        within: The same difference within classes, averaged over them; NaN where no class has both outcomes twice.
    """

    layer: str
    head: int
    statistic: str
    wrong: float
    right: float
    g: float
    low: float
    high: float
    p_value: float
    within: float


@dataclass(frozen=True, eq=False)
class WrongSample:
    """One sample of the gallery.

    Args:
        number: Its place among the samples that its process looked at.
        loss: Cross-entropy of the logits.
        confidence: Probability of the class that was predicted.
        target: Its class.
        predicted: The class that was predicted.
        labels: Text of each token, padding left out; empty where tokens are not known.
        maps: ``(heads, queries, keys)`` by the name of the layer, float16, padding left out; pooled where long.
        image: ``(channels, height, width)``, or ``None``.
    """

    number: int
    loss: float
    confidence: float
    target: int
    predicted: int
    labels: tuple[str, ...]
    maps: dict[str, Tensor]
    image: Tensor | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, lists and strings; NaN becomes ``None``; maps and image stay behind."""
        names = ("number", "loss", "confidence", "target", "predicted", "labels")
        return {name: plain(getattr(self, name)) for name in names}


@dataclass(frozen=True, eq=False)
class ErrorAnalysisResult:
    """What `ErrorAnalysis` found in one validation.

    Effects compare one group of samples with another; p-values are corrected with Holm's procedure over everything
    that a field holds.

    Args:
        epoch: Epoch of training.
        layer_names: Names of the layers.
        statistics: Names of the statistics: those of `head_statistics`, and ``mass/<set>``.
        class_names: Names of the classes.
        samples: Number of samples, ``(classes, 2)``, wrong ones first.
        mean: Over samples, ``(layers, heads, statistics, 2)``, wrong ones first.
        standard_error: Of ``mean``.
        outcome: Wrong less right samples, ``(layers, heads, statistics)``.
        outcome_p: Corrected p-values.
        within: The same within each class, ``(layers, heads, statistics, classes)``.
        within_p: Corrected p-values.
        adjusted: ``g`` of ``within`` averaged over classes by precision, ``(layers, heads, statistics)``: what is left
            when wrong and right samples are of the same class.
        adjusted_error: Standard error of ``adjusted``.
        class_mean: Mean over the samples of each class, ``(layers, heads, statistics, classes)``.
        class_error: Standard error of ``class_mean``.
        by_class: A class less all others, ``(layers, heads, statistics, classes)``.
        by_class_p: Corrected p-values.
        worst: Samples of the highest loss, the highest first.
        confident: Samples that were wrong with the highest confidence, the highest first.
    """

    epoch: int
    layer_names: tuple[str, ...]
    statistics: tuple[str, ...]
    class_names: tuple[str, ...]
    samples: Tensor
    mean: Tensor
    standard_error: Tensor
    outcome: EffectSize
    outcome_p: Tensor
    within: EffectSize
    within_p: Tensor
    adjusted: Tensor
    adjusted_error: Tensor
    class_mean: Tensor
    class_error: Tensor
    by_class: EffectSize
    by_class_p: Tensor
    worst: tuple[WrongSample, ...] = ()
    confident: tuple[WrongSample, ...] = ()

    @property
    def error_rate(self) -> float:
        """Share of samples that are predicted wrong."""
        wrong, right = self.samples.sum(dim=0).tolist()
        return int(wrong) / max(1, int(wrong + right))

    def differences(self, level: float = LEVEL) -> tuple[HeadDifference, ...]:
        """Return heads and statistics that differ on mistakes beyond chance, the largest effect first."""
        found = (self.outcome_p < level).nonzero().tolist()
        return tuple(sorted((self._difference(*cell) for cell in found), key=lambda each: -abs(each.g)))

    def ranking(self, most: int) -> list[tuple[int, int]]:
        """Return layers and heads by what differs most in them: those beyond chance first, then by size."""
        size = self.outcome.g.abs().nan_to_num(-1.0)
        if not size.numel():
            return []
        known = size + torch.where(self.outcome_p < LEVEL, size.max().clamp_min(0.0) + 1, 0.0)
        best = known.amax(dim=-1)
        order: list[int] = best.flatten().argsort(descending=True, stable=True).tolist()
        heads = best.shape[1]
        real = ~self.mean.isnan().all(dim=-1).all(dim=-1)
        return [(place // heads, place % heads) for place in order if real[place // heads, place % heads]][:most]

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, lists and strings; NaN becomes ``None``."""
        names = ("epoch", "layer_names", "statistics", "class_names")
        found = {name: plain(getattr(self, name)) for name in names}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                found[name] = plain(value)
            elif isinstance(value, EffectSize):
                found[name] = plain(value._asdict())
        return found | {name: [each.to_dict() for each in getattr(self, name)] for name in ("worst", "confident")}

    def _difference(self, layer: int, head: int, statistic: int) -> HeadDifference:
        cell = (layer, head, statistic)
        numbers = (*self.mean[cell], *(field[cell] for field in self.outcome[1:2] + self.outcome[3:5]))
        rest = (self.outcome_p[cell], self.adjusted[cell])
        values = [float(number) for number in (*numbers, *rest)]
        return HeadDifference(self.layer_names[layer], head, self.statistics[statistic], *values)


def conclude_errors(
    epoch: int, layers: Sequence[str], statistics: Sequence[str], classes: Sequence[str], sums: Moments, samples: Tensor
) -> ErrorAnalysisResult:
    """Compare outcomes and classes.

    Args:
        epoch: Epoch of training.
        layers: Names of the layers.
        statistics: Names of the statistics; those that nobody has are left out.
        classes: Names of the classes.
        sums: ``(layers, heads, statistics, classes, 2)``.
        samples: Number of samples, ``(classes, 2)``.
    """
    seen = sums.samples.sum(dim=(0, 1, 3, 4)) > 0
    sums = Moments(*(field[:, :, seen] for field in sums))
    names = tuple(name for name, there in zip(statistics, seen.tolist(), strict=True) if there)
    by_outcome, by_class = (Moments(*(field.sum(dim=dim) for field in sums)) for dim in (3, 4))
    outcome, within = effect_size(*_split(by_outcome)), effect_size(*_split(sums))
    rest = Moments(*(field.sum(dim=-1, keepdim=True) - field for field in by_class))
    against = effect_size(by_class, rest)
    precision = (1 / within.standard_error**2).nan_to_num(0.0)
    total = precision.sum(dim=-1)
    adjusted = (within.g.nan_to_num(0.0) * precision).sum(dim=-1) / total  # 0 / 0 is NaN
    return ErrorAnalysisResult(
        epoch, tuple(layers), names, tuple(classes), samples, *mean_and_error(*by_outcome),
        outcome, holm(outcome.p_value), within, holm(within.p_value),
        adjusted, total.rsqrt().where(total > 0, torch.nan), *mean_and_error(*by_class),
        against, holm(against.p_value),
    )  # fmt: skip


def _split(sums: Moments) -> tuple[Moments, Moments]:
    """Return the moments of wrong samples and those of right ones."""
    return Moments(*(field[..., 0] for field in sums)), Moments(*(field[..., 1] for field in sums))
