"""Roles of heads added up over a data set: mean scores with standard errors, and how often which label wins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attn_callbacks._checks import at_least, check_axes
from attn_callbacks._plain import plain
from attn_callbacks.functional.patterns import PatternScores
from attn_callbacks.functional.role_labels import ROLE_LABELS, RoleLabels, label_roles, role_thresholds
from attn_callbacks.functional.roles import ROLES
from attn_callbacks.metrics.accumulator import Accumulator
from attn_callbacks.metrics.moments import mean_and_error

__all__ = ["HeadRolesMetric", "HeadRolesResult"]

_MOMENTS = 7


class HeadRolesResult(NamedTuple):
    """What `HeadRolesMetric` computes. Averages are over samples, of which each counts once, whatever its length.

    Args:
        score: Mean score, ``(layers, heads, roles)``, NaN without a sample. float64.
        standard_error: Standard error of ``score``, NaN below two samples. float64.
        chance: Mean score of uniform attention. float64.
        strength: ``(score - chance) / (1 - chance)``; NaN where ``chance`` exceeds 0.9. float64.
        strength_error: Standard error of ``strength``, as that of a ratio of sums; NaN below two samples. float64.
        coverage: Mean share of rows for which the role expects any key, over all samples. float64.
        samples: Number of samples in which the role has a score. int64.
        wins: Number of samples in which each of `ROLE_LABELS` wins, ``(layers, heads, labels)``. int64.
        thresholds: Strength that a head must exceed to be given each role, ``(roles,)``.
        layer_names: Names of the layers, where they are known.
    """

    score: Tensor
    standard_error: Tensor
    chance: Tensor
    strength: Tensor
    strength_error: Tensor
    coverage: Tensor
    samples: Tensor
    wins: Tensor
    thresholds: Tensor
    layer_names: tuple[str, ...] = ()

    def labels(self) -> RoleLabels:
        """Return label, strength, margin and coverage of every head, ``(layers, heads)``, from the mean scores."""
        limits = dict(zip(ROLES, self.thresholds.tolist(), strict=True))
        return label_roles(PatternScores(self.score, self.chance, self.coverage), limits)

    def agreement(self) -> Tensor:
        """Return the share of samples in which each head's label wins by itself, ``(layers, heads)``; NaN without."""
        label = self.labels().label
        won = self.wins.gather(-1, label.clamp_min(0)[..., None])[..., 0]
        return (won / self.wins.sum(dim=-1)).masked_fill(label < 0, torch.nan)

    def names(self) -> list[list[str]]:
        """Return the label of every head as a word, layer by layer; an empty one for a head that does not exist."""
        return [[ROLE_LABELS[label] if label >= 0 else "" for label in layer] for layer in self.labels().label.tolist()]

    def describe(self) -> list[str]:
        """Return a line for each head with everything that its label rests on, threshold included."""
        labels, agreement = self.labels(), self.agreement()
        lines = []
        for layer, head in (labels.label >= 0).nonzero().tolist():
            name = self.layer_names[layer] if self.layer_names else f"layer {layer}"
            label = int(labels.label[layer, head])
            parts = [f"{name} head {head}: {ROLE_LABELS[label]}"]
            if label < len(ROLES):
                strength, error = self.strength[layer, head, label], self.strength_error[layer, head, label]
                parts.append(f"strength {strength:.2f} ± {error:.2f} (above {self.thresholds[label]:.2f})")
                parts.append(f"{labels.coverage[layer, head]:.0%} of rows")
            parts.append(f"margin {labels.confidence[layer, head]:.2f}")
            parts.append(f"{agreement[layer, head]:.0%} of {int(self.wins[layer, head].sum())} samples agree")
            lines.append(", ".join(parts))
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, lists and strings; NaN becomes ``None``."""
        labels = self.labels()
        fields = {name: plain(value) for name, value in self._asdict().items() if isinstance(value, Tensor)}
        return {
            **fields,
            "thresholds": dict(zip(ROLES, fields["thresholds"], strict=True)),
            "layer_names": list(self.layer_names),
            "roles": list(ROLES),
            "labels": self.names(),
            "confidence": plain(labels.confidence),
            "agreement": plain(self.agreement()),
        }


class HeadRolesMetric(Accumulator):
    """Average `head_roles` over samples, for every layer and head, and count which label wins in each.

    States are sums and counts of fixed size (about 1.1 kB a head), so the result of several processes is that of one
    process on all their samples. An update waits for no device.

    Args:
        layers: Number of attention layers (or sites).
        heads: Largest number of heads of any layer; the missing heads of smaller layers stay NaN.
        thresholds: Strengths to exceed, by role, in place of some of `THRESHOLDS`.
        layer_names: Names of the layers, for the result.

    Raises:
        ValueError: If ``layers`` or ``heads`` is below 1, a role is unknown or ``layer_names`` are not as many as
            layers; in `update`, if a layer, head count or shape does not fit.

    Example:
        >>> from attn_callbacks.functional.roles import head_roles
        >>> metric = HeadRolesMetric(layers=1, heads=2)
        >>> previous = torch.eye(9).roll(-1, dims=-1)
        >>> weights = torch.stack([previous, torch.full((9, 9), 1 / 9)])
        >>> metric.update(0, head_roles(weights.expand(4, 2, 9, 9)))
        >>> metric.compute().names()
        [['previous', 'uniform']]

    References:
        Cochran, "Sampling Techniques", 1977, section 6.4 (the standard error of a ratio).
    """

    moments: Tensor
    wins: Tensor
    thresholds: Tensor

    def __init__(
        self,
        layers: int,
        heads: int,
        thresholds: Mapping[str, float] | None = None,
        layer_names: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.layers, self.heads = at_least("layers", layers, 1), at_least("heads", heads, 1)
        self.layer_names = tuple(layer_names)
        if len(self.layer_names) not in (0, layers):
            raise ValueError(f"`layer_names` must name {layers} layers, got {len(self.layer_names)}.")
        # sums over samples: with a score s and its chance c 1, s, s^2, c, s c, c^2; coverage
        self.add_zeros("moments", layers, heads, len(ROLES), _MOMENTS)
        self.add_zeros("wins", layers, heads, len(ROLE_LABELS))
        with torch.inference_mode(False):
            limits = role_thresholds(thresholds, torch.zeros((), dtype=torch.float64))
            self.register_buffer("thresholds", limits, persistent=False)
        self._given = dict(thresholds or {})

    def update(self, layer: int, scores: PatternScores) -> None:
        """Add one batch of one layer.

        Args:
            layer: Index of the layer.
            scores: Output of `head_roles`, each field ``(batch, heads, roles)``. NaN leaves that sample out of that
                role.
        """
        heads = self._checked_heads(layer, scores)
        score, chance, coverage = (field.detach().double() for field in scores)
        counted = ~score.isnan() & ~chance.isnan()
        score, chance = score.where(counted, 0.0), chance.where(counted, 0.0)
        terms = (counted.double(), score, score**2, chance, score * chance, chance**2, coverage.nan_to_num(0.0))
        self.writable("moments")[layer, :heads] += torch.stack([term.sum(dim=0) for term in terms], dim=-1)
        label = label_roles(scores, self._given).label  # (batch, heads)
        won = label[..., None] == torch.arange(len(ROLE_LABELS), device=label.device)
        self.writable("wins")[layer, :heads] += won.sum(dim=0)

    def compute(self) -> HeadRolesResult:
        """Return scores with their standard errors, and how often which label wins."""
        count, first, square, chance, cross, chance_square, coverage = self.moments.unbind(dim=-1)
        score, error = mean_and_error(count, first, square)
        level = chance / count
        strength = PatternScores(score, level, score).strength()
        # of a sample: score - chance - strength * (1 - chance), of which the mean is zero
        rest = 1 - strength
        spread = (
            square
            - 2 * rest * cross
            + rest**2 * chance_square
            + count * strength**2
            - 2 * strength * (first - rest * chance)
        )
        variance = spread.clamp_min(0.0) / (count * (count - 1).clamp_min(1.0))
        strength_error = (variance.sqrt() / (1 - level)).masked_fill(count < 2, torch.nan)
        samples = self.wins.sum(dim=-1, keepdim=True)
        return HeadRolesResult(
            score,
            error,
            level,
            strength,
            strength_error,
            coverage / samples,
            count.long(),
            self.wins.long(),
            self.thresholds,
            self.layer_names,
        )

    def _checked_heads(self, layer: int, scores: PatternScores) -> int:
        if not 0 <= layer < self.layers:
            raise ValueError(f"`layer` must lie between 0 and {self.layers - 1}, got {layer}.")
        check_axes("scores", scores.score, 3)
        if scores.score.shape[2] != len(ROLES):
            raise ValueError(f"`scores` must hold the {len(ROLES)} of `ROLES`, got {scores.score.shape[2]}.")
        heads = scores.score.shape[1]
        if heads > self.heads:
            raise ValueError(f"`scores` must have at most {self.heads} heads, got {heads}. Raise `heads`.")
        return heads
