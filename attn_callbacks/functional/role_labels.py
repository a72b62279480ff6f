"""Name the role of a head from its scores, and say how clear the name is."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from attn_callbacks._checks import in_range
from attn_callbacks.functional._scores import PatternScores
from attn_callbacks.functional.roles import ROLES

__all__ = ["ROLE_LABELS", "THRESHOLDS", "RoleLabels", "label_roles", "role_thresholds"]

ROLE_LABELS: tuple[str, ...] = (*ROLES, "heterogeneous")
"""Names of labels by number: the roles, and what fits none of them."""

THRESHOLDS: Mapping[str, float] = MappingProxyType(
    {**dict.fromkeys(ROLES, 0.5), "sink": 0.3, "vertical": 0.3, "uniform": 0.75}
)
"""Strength that a head must exceed to be given a role."""

_CONTAINED: Mapping[str, tuple[str, ...]] = {
    "self": ("class_gather",),  # where only the class token reads, the others rest somewhere
    "sink": ("class_gather",),
    "special": ("sink", "separator", "class_gather"),
    "diagonal": ("previous", "next", "self", "class_gather"),
    "vertical": ("sink", "separator", "special", "class_gather"),
    "local": ("previous", "next", "self", "diagonal", "class_gather"),
    "block": ("previous", "next", "self", "diagonal", "class_gather"),
    "row": ("previous", "next"),
    "long_range": ("sink", "separator", "special", "vertical", "duplicate", "induction"),
}
_EXPLAINED = 0.5
_TIE = 0.02


class RoleLabels(NamedTuple):
    """Labels of heads; fields have the shape of the scores without their last axis.

    Args:
        label: Index into `ROLE_LABELS`, -1 where no role is defined. int64.
        strength: Strength of the role that won, NaN without one.
        confidence: Winning margin: that strength less the largest one of a rival, or less the threshold if that is
            higher. No rivals are roles that contain the winner or that it contains, and roles that are no candidates
            for lack of rows. Of ``heterogeneous``: how far the nearest role stays below its threshold.
        coverage: Share of the rows for which the winner expects any key, NaN without a winner.
    """

    label: Tensor
    strength: Tensor
    confidence: Tensor
    coverage: Tensor


def label_roles(
    scores: PatternScores, thresholds: Mapping[str, float] | None = None, min_coverage: float = 0.1
) -> RoleLabels:
    """Give each head the role that it fits best beyond chance, or ``heterogeneous``.

    Roles whose strength exceeds their threshold are candidates. A general one is dropped if a candidate that it
    contains has at least half of its strength: a head on the previous token is local and diagonal as well. The
    strongest of the rest wins; within 0.02, the more specific (the earlier of `ROLES`). Cheap, and waits for no device.

    The thresholds act on the strength, so a head that passes also passes them with its plain score. Half of the mass on
    the previous, the next or a special token is how Clark et al. count such heads, 0.3 on the first token is the sink
    of Gu et al.; all other thresholds, and the rules above, are declared heuristics of ours. Print them with a label.

    Args:
        scores: From `head_roles`, of samples or averaged over them.
        thresholds: Strengths to exceed, by role, in place of some of `THRESHOLDS`.
        min_coverage: Roles that expect any key for fewer of the rows are no candidates.

    Shape:
        - scores: each field ``(..., roles)``
        - output: each field ``(...)``

    Raises:
        ValueError: If a role is unknown, a number is not in [0, 1], or the last axis is not that of `ROLES`.

    Example:
        >>> from attn_callbacks.functional.roles import head_roles
        >>> labels = label_roles(head_roles(torch.eye(9).roll(-1, dims=-1)[None, None]))
        >>> ROLE_LABELS[labels.label.item()], labels.strength.item()
        ('previous', 1.0)

    References:
        Clark et al., "What Does BERT Look At?", 2019, section 3; Gu et al., "When Attention Sink Emerges in Language
        Models", 2024; Kovaleva et al., "Revealing the Dark Secrets of BERT", 2019 (the word heterogeneous).
    """
    limits = role_thresholds(thresholds, scores.score)
    in_range("min_coverage", min_coverage, 0.0, 1.0)
    if scores.score.shape[-1] != len(ROLES):
        raise ValueError(f"`scores` must hold the {len(ROLES)} of `ROLES`, got {scores.score.shape[-1]}.")
    strength = scores.strength()
    possible = ~strength.isnan() & (scores.coverage >= min_coverage)
    above = (strength - limits).where(possible, -torch.inf)
    winner, found = _winner(strength, above > 0)
    top = strength.gather(-1, winner)
    nested = _containment(strength.device, symmetric=True)[winner[..., 0]]
    rival = strength.where(possible & ~nested, 0.0).amax(dim=-1, keepdim=True)
    margin = (top - torch.maximum(rival, limits[winner])).clamp_min(0.0).where(found, -above.amax(dim=-1, keepdim=True))
    label = winner.where(found, len(ROLES)).where(possible.any(dim=-1, keepdim=True), -1)
    return RoleLabels(
        label[..., 0],
        top.where(found, torch.nan)[..., 0],
        margin.where(label >= 0, torch.nan)[..., 0],
        scores.coverage.gather(-1, winner).where(found, torch.nan)[..., 0],
    )


def role_thresholds(thresholds: Mapping[str, float] | None, like: Tensor) -> Tensor:
    """Return the threshold of every role ``(roles,)``, with precision and device of ``like``.

    Args:
        thresholds: By role, in place of some of `THRESHOLDS`.
        like: Any tensor.

    Raises:
        ValueError: If a role is unknown, or a threshold is not in [0, 1].
    """
    given = dict(thresholds or {})
    unknown = ", ".join(map(repr, set(given) - set(ROLES)))
    if unknown:
        raise ValueError(f"`thresholds` must name roles, got {unknown}. Known: {', '.join(map(repr, ROLES))}.")
    for name, value in given.items():
        in_range(f"thresholds[{name!r}]", value, 0.0, 1.0)
    return torch.tensor([{**THRESHOLDS, **given}[name] for name in ROLES], dtype=like.dtype, device=like.device)


def _winner(strength: Tensor, passes: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the role that wins and whether there is one, both ``(..., 1)``."""
    inner = strength.where(passes, -torch.inf)[..., None, :]  # (..., 1, roles) beside (..., roles, 1)
    explained = (_containment(strength.device) & (inner >= _EXPLAINED * strength[..., None])).any(dim=-1)
    values = strength.where(passes & ~explained, -torch.inf)
    best = values.amax(dim=-1, keepdim=True)
    order = torch.arange(len(ROLES), 0, -1, device=strength.device)
    return ((values >= best - _TIE) * order).argmax(dim=-1, keepdim=True), best > -torch.inf


def _containment(device: torch.device, symmetric: bool = False) -> Tensor:
    """``(general, specific)``, bool: the first role holds of every head of which the second does, or either of both."""
    table = [[inner in _CONTAINED.get(outer, ()) for inner in ROLES] for outer in ROLES]
    if symmetric:
        table = [[table[i][j] or table[j][i] or i == j for j in range(len(ROLES))] for i in range(len(ROLES))]
    return torch.tensor(table, device=device)
