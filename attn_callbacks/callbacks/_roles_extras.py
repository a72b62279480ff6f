"""What is found beside roles, each with a guard of its own: clusters of heads, and induction on a random text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from attn_callbacks._lightning import rank_zero_warn
from attn_callbacks.analysis.clusters import HeadClusters, cluster_heads
from attn_callbacks.analysis.pattern_probe import PROBED, AttentionPatternProbe, PatternProbeResult
from attn_callbacks.callbacks._bias_names import is_sharded
from attn_callbacks.callbacks._guard import Guard
from attn_callbacks.callbacks._roles_log import cluster_pictures, redundant_text
from attn_callbacks.callbacks._roles_memory import HeadMemory
from attn_callbacks.render import Picture, layer_head_grid

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["Found", "RoleExtras"]


@dataclass
class Found:
    """What is to be told, by tag."""

    pictures: dict[str, Callable[[], Picture]] = field(default_factory=dict)
    scalars: dict[str, float] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)


class RoleExtras:
    """Clusters heads and probes a module, as far as it was asked to and can; says so once where it cannot.

    Args:
        trainer: Knows the device and the strategy.
        layers: Names or glob patterns of attention modules.
        clusters: Cluster heads: in as many clusters as fit best, or in so many.
        vocabulary: Number of token ids of the probe; ``None`` for none.
    """

    def __init__(
        self, trainer: Trainer, layers: Sequence[str] | None, clusters: bool | int, vocabulary: int | None
    ) -> None:
        self.clusters: HeadClusters | None = None
        self.probe: PatternProbeResult | None = None
        self._trainer, self._layers = trainer, layers
        self._guards = Guard("The clusters of `HeadRoles`"), Guard("The probe of `HeadRoles`")
        self._wants_clusters = bool(clusters) and _has_scipy()
        self._number = None if isinstance(clusters, bool) else clusters
        self._vocabulary = vocabulary
        if vocabulary is not None and is_sharded(trainer):
            self._vocabulary = None
            rank_zero_warn("The probe of `HeadRoles` cannot run a network whose parameters are sharded: left out.")

    def find(self, memory: HeadMemory, module: LightningModule) -> Found:
        """Return what is to be told of this validation."""
        found = Found()
        if self._wants_clusters and not self._guards[0].off:
            with self._guards[0].block(), torch.inference_mode(False), torch.no_grad():
                self._cluster(memory, found)
        if self._vocabulary is not None and not self._guards[1].off:
            with self._guards[1].block():
                self._run_probe(module, self._vocabulary, found)
        return found

    def _cluster(self, memory: HeadMemory, found: Found) -> None:
        distances, layers, sizes = memory.distances(self._trainer.strategy.root_device)
        if sum(sizes) < 2:
            return
        number = None if self._number is None else min(self._number, sum(sizes))
        found_now = cluster_heads(distances, clusters=number, layer_names=layers, heads_per_layer=sizes)
        before, self.clusters = self.clusters, found_now
        if before is not None and before.layer_names == self.clusters.layer_names:
            found.scalars["roles/cluster_agreement"] = self.clusters.agreement(before)
        found.pictures |= cluster_pictures(self.clusters, f"epoch {self._trainer.current_epoch}")
        found.texts["roles/redundant"] = redundant_text(self.clusters)

    def _run_probe(self, module: LightningModule, vocabulary: int, found: Found) -> None:
        self.probe = AttentionPatternProbe(vocabulary, layers=self._layers).run(module)
        for number, name in enumerate(PROBED):
            strength = self.probe.strength[..., number].numpy()
            draw = partial(layer_head_grid, strength, title=f"probe: {name}", layer_labels=self.probe.layer_names)
            found.pictures[f"roles/probe/{name}"] = draw
            found.scalars[f"roles/probe_{name}"] = float(self.probe.strength[..., number].nan_to_num(-1.0).max())


def _has_scipy() -> bool:
    if find_spec("scipy") is not None:
        return True
    rank_zero_warn("`HeadRoles` leaves clusters out: they need scipy. Install it with `attn-callbacks[analysis]`.")
    return False
