"""Pure functions over attention: statistics and importance of heads, mass on token sets, divergences. Torch only."""

from __future__ import annotations

from attn_callbacks.functional.divergence import jensen_shannon, pairwise_jensen_shannon
from attn_callbacks.functional.entropy import head_entropy
from attn_callbacks.functional.importance import gate_gradient
from attn_callbacks.functional.mass import attention_lift, attention_mass, target_share
from attn_callbacks.functional.rows import row_mean, stratified_rows
from attn_callbacks.functional.statistics import STATISTICS, head_statistics

__all__ = [
    "STATISTICS",
    "attention_lift",
    "attention_mass",
    "gate_gradient",
    "head_entropy",
    "head_statistics",
    "jensen_shannon",
    "pairwise_jensen_shannon",
    "row_mean",
    "stratified_rows",
    "target_share",
]
