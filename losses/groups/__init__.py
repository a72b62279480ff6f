"""Losses over groups of samples, known or unknown: the worst one counts."""

from __future__ import annotations

from losses.groups.cvar import CVaRLoss, cvar_loss
from losses.groups.group_dro import GroupDROLoss, group_dro_loss
from losses.groups.worst_group import WorstGroupLoss, worst_group_loss

__all__ = [
    "CVaRLoss",
    "GroupDROLoss",
    "WorstGroupLoss",
    "cvar_loss",
    "group_dro_loss",
    "worst_group_loss",
]
