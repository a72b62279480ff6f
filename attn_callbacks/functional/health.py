"""When to raise an alarm about attention while a model trains."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attn_callbacks._checks import at_least, in_range
from attn_callbacks.functional.vitals import VITALS

__all__ = ["HealthAlert", "HealthThresholds", "dead_alert", "health_alerts", "is_whole", "seems_dead"]

_ROWS, _ENTROPY, _CONFIDENCE, _KEY_MASS, _MAX_LOGIT = range(len(VITALS))


@dataclass(frozen=True)
class HealthThresholds:
    """When something about attention is worth an alarm. Look: one measurement, every some steps.

    No paper names a limit of entropy; limits without a source are declared heuristics, chosen so that they keep silent
    where training goes well and speak before a loss diverges.

    Args:
        entropy: A layer has collapsed if the mean normalised entropy of its heads is below this (heuristic; the
            phenomenon: Zhai et al. 2023) ...
        entropy_fall: ... and has fallen to less than this share of what it was within the last ``looks`` looks.
            Heads that became sharp slowly, as attention sinks do, are no collapse.
        max_logit: Largest score before the softmax. 100 is where QK-Clip begins to scale queries and keys down (Kimi
            K2, 2025; the default of Megatron-LM).
        logit_growth: The largest score of a layer grows too fast if it is this many times what it was within the last
            ``looks`` looks (heuristic) ...
        least_growing_logit: ... and above this: growth of small scores is learning (heuristic).
        confidence: A head is saturated, and its softmax passes on hardly any gradient, if its largest weight is above
            this in the mean over rows (heuristic).
        saturated_share: A layer is, if more than this share of its heads became so since the first look (heuristic).
        uniform: A head is dead if its normalised entropy is above this, so that it averages all tokens, while another
            of its layer is not (heuristic) ...
        key_mass: ... or if one key has more than this share of its weight in every sample, which was not so at the
            first look: what it puts out does not depend on the query (heuristic) ...
        dead_looks: ... in so many looks one after the other; ``None``: dead heads raise no alarm.
        drift: A head changed suddenly if its normalised entropy moved by more than this from one look to the next
            (heuristic) ...
        drift_ratio: ... and so many times as far as in the median of its last moves, of which ``looks / 2`` must be
            known (heuristic).
        looks: How many looks back "fast" reaches.

    Raises:
        ValueError: If a share is not in [0, 1], a factor or limit negative, or a number of looks too small.
    """

    entropy: float = 0.2
    entropy_fall: float = 0.5
    max_logit: float = 100.0
    logit_growth: float = 2.0
    least_growing_logit: float = 20.0
    confidence: float = 0.99
    saturated_share: float = 0.5
    uniform: float = 0.999
    key_mass: float = 0.99
    dead_looks: int | None = 20
    drift: float = 0.3
    drift_ratio: float = 5.0
    looks: int = 10

    def __post_init__(self) -> None:
        for name in ("entropy", "entropy_fall", "confidence", "saturated_share", "uniform", "key_mass", "drift"):
            in_range(name, getattr(self, name), 0.0, 1.0)
        for name in ("max_logit", "logit_growth", "least_growing_logit", "drift_ratio"):
            in_range(name, getattr(self, name), 0.0, float("inf"))
        if self.dead_looks is not None:
            at_least("dead_looks", self.dead_looks, 1)
        at_least("looks", self.looks, 2)


@dataclass(frozen=True)
class HealthAlert:
    """Something about a layer or some of its heads that is worth an alarm.

    Args:
        kind: ``"not_finite"``, ``"entropy_collapse"``, ``"max_logit"``, ``"logit_growth"``, ``"saturated"``,
            ``"dead"`` or ``"drift"``.
        heads: The heads it is about; empty where it is about the layer.
        value: What was measured.
        limit: What it should not have passed.
        text: The same in a sentence, without the name of the layer.
    """

    kind: str
    heads: tuple[int, ...]
    value: float
    limit: float
    text: str


def health_alerts(
    now: Tensor, recent: Tensor, first: Tensor, thresholds: HealthThresholds | None = None
) -> tuple[HealthAlert, ...]:
    """Tell what is wrong with a layer, from its vitals now and before. A pure function of numbers on the CPU.

    Args:
        now: Vitals of this look.
        recent: Those of the looks before, oldest first; looks that did not measure every head, or that were not
            finite, are passed over.
        first: Those of the first look of the run.
        thresholds: When to raise an alarm; ``None`` takes the defaults.

    Shape:
        - now, first: ``(heads, vitals)``, output of :func:`~attn_callbacks.functional.vitals.pooled_vitals`
        - recent: ``(looks, heads, vitals)``, may be empty

    Example:
        >>> calm = torch.tensor([[64.0, 0.9, 0.3, 0.2, 3.0]])
        >>> hot = torch.tensor([[64.0, 0.1, 0.9, 0.2, 120.0]])
        >>> [alert.kind for alert in health_alerts(hot, calm[None], calm)]
        ['entropy_collapse', 'max_logit', 'logit_growth']

    References:
        Zhai et al., "Stabilizing Transformer Training by Preventing Attention Entropy Collapse", 2023; Kimi Team, "Kimi
        K2: Open Agentic Intelligence", 2025 (QK-Clip). Everything else is declared in :class:`HealthThresholds`.
    """
    limits = thresholds or HealthThresholds()
    measured = now[:, _ROWS] > 0
    finite = now[:, [_ENTROPY, _CONFIDENCE]].isfinite().all(dim=-1) & (now[:, _MAX_LOGIT] < torch.inf)
    broken = _numbers(measured & ~finite)
    if broken:
        return (HealthAlert("not_finite", broken, torch.nan, torch.inf, "attention is not finite"),)
    if not bool(measured.all()):
        return ()
    recent = recent[is_whole(recent)]
    found = [
        _collapse(now, recent, limits),
        *_logits(now, recent, limits),
        _saturated(now, first, limits),
        _dead(now, recent, first, limits),
        _drift(now, recent, limits),
    ]
    return tuple(alert for alert in found if alert is not None)


def is_whole(looks: Tensor) -> Tensor:
    """Tell which looks ``(..., heads, vitals)`` measured every head and found it finite: bool ``(...)``."""
    finite = looks[..., [_ENTROPY, _CONFIDENCE]].isfinite().all(dim=-1) & (looks[..., _MAX_LOGIT] < torch.inf)
    return (finite & (looks[..., _ROWS] > 0)).all(dim=-1)


def seems_dead(looks: Tensor, first: Tensor, limits: HealthThresholds) -> Tensor:
    """Tell which heads average all tokens, and which take one key: bool ``(..., 2, heads)``."""
    stuck = (looks[..., _KEY_MASS] > limits.key_mass) & ~(first[:, _KEY_MASS] > limits.key_mass)
    return torch.stack([looks[..., _ENTROPY] > limits.uniform, stuck], dim=-2)


def dead_alert(now: Tensor, runs: Tensor, limits: HealthThresholds) -> HealthAlert | None:
    """Tell of dead heads.

    Args:
        now: Vitals of this look, ``(heads, vitals)``.
        runs: In how many looks one after the other, this one included, they seemed dead: ``(2, heads)``, the count of
            what `seems_dead` returns.
        limits: When to raise an alarm.
    """
    if limits.dead_looks is None:
        return None
    uniform, stuck = runs >= limits.dead_looks
    heads = _numbers(uniform & ~(now[:, _ENTROPY] > limits.uniform).all() | stuck)
    if not heads:
        return None
    text = (
        f"heads {', '.join(map(str, heads))} averaged all tokens, or took one key whatever the query, in "
        f"{limits.dead_looks} looks"
    )
    return HealthAlert("dead", heads, float(limits.dead_looks), float(limits.dead_looks), text)


def _collapse(now: Tensor, recent: Tensor, limits: HealthThresholds) -> HealthAlert | None:
    value = float(now[:, _ENTROPY].mean())
    before = recent[-limits.looks :, :, _ENTROPY].mean(dim=-1)
    highest = float(before.max()) if len(before) else 0.0
    if not (value < limits.entropy and value < limits.entropy_fall * highest):
        return None
    text = f"the mean normalised entropy of its heads fell from {highest:.2f} to {value:.2f} (limit {limits.entropy:g})"
    return HealthAlert("entropy_collapse", (), value, limits.entropy, text)


def _logits(now: Tensor, recent: Tensor, limits: HealthThresholds) -> list[HealthAlert | None]:
    value, alerts = float(now[:, _MAX_LOGIT].max()), []
    if value > limits.max_logit:
        text = f"the largest score before the softmax is {value:.4g} (limit {limits.max_logit:g})"
        alerts.append(
            HealthAlert("max_logit", _numbers(now[:, _MAX_LOGIT] > limits.max_logit), value, limits.max_logit, text)
        )
    before = recent[-limits.looks :, :, _MAX_LOGIT].amax(dim=-1)
    least = float(before.min()) if len(before) else torch.inf
    limit = max(limits.least_growing_logit, limits.logit_growth * least)
    if value > limit:
        text = f"the largest score before the softmax grew from {least:.4g} to {value:.4g} within {len(before)} looks"
        alerts.append(HealthAlert("logit_growth", (), value, limit, text))
    return list(alerts)


def _saturated(now: Tensor, first: Tensor, limits: HealthThresholds) -> HealthAlert | None:
    became = (now[:, _CONFIDENCE] > limits.confidence) & ~(first[:, _CONFIDENCE] > limits.confidence)
    share = float(became.float().mean())
    if not share > limits.saturated_share:
        return None
    text = f"{int(became.sum())} of {len(now)} heads put more than {limits.confidence:g} of a row on one key"
    return HealthAlert("saturated", _numbers(became), share, limits.saturated_share, text)


def _dead(now: Tensor, recent: Tensor, first: Tensor, limits: HealthThresholds) -> HealthAlert | None:
    seeming = seems_dead(torch.cat([recent, now[None]]), first, limits)
    return dead_alert(now, seeming.long().flip(0).cumprod(dim=0).sum(dim=0), limits)


def _drift(now: Tensor, recent: Tensor, limits: HealthThresholds) -> HealthAlert | None:
    entropy = torch.cat([recent[-limits.looks :], now[None]])[..., _ENTROPY]
    moves = entropy.diff(dim=0).abs()
    if len(moves) <= limits.looks // 2:
        return None
    usual = moves[:-1].median(dim=0).values
    jumped = (moves[-1] > limits.drift) & (moves[-1] > limits.drift_ratio * usual)
    heads = _numbers(jumped)
    if not heads:
        return None
    farthest = float(moves[-1][jumped].max())
    text = f"the normalised entropy of heads {', '.join(map(str, heads))} moved by up to {farthest:.2f} in one look"
    return HealthAlert("drift", heads, farthest, limits.drift, text)


def _numbers(heads: Tensor) -> tuple[int, ...]:
    return tuple(heads.nonzero().flatten().tolist())
