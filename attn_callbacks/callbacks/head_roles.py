"""HeadRoles: what every attention head does, and when that changed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from attn_callbacks._checks import at_least, in_range, name_list
from attn_callbacks._lightning import rank_zero_warn
from attn_callbacks.analysis.clusters import HeadClusters
from attn_callbacks.analysis.pattern_probe import PatternProbeResult
from attn_callbacks.batch import BatchSchema
from attn_callbacks.callbacks._agreed import log_monitored
from attn_callbacks.callbacks._loggers import can_log, log_point, log_text, with_epoch
from attn_callbacks.callbacks._observer import ValidationObserver
from attn_callbacks.callbacks._roles_batch import RoleReader, id_list, token_ids
from attn_callbacks.callbacks._roles_extras import RoleExtras
from attn_callbacks.callbacks._roles_log import (
    MONITORED,
    append_roles,
    change_text,
    monitored_scalars,
    role_pictures,
    share_scalars,
)
from attn_callbacks.callbacks._roles_memory import HeadMemory
from attn_callbacks.callbacks._roles_sums import RoleSums
from attn_callbacks.callbacks._roles_timeline import RoleChange, RoleTimeline
from attn_callbacks.callbacks._samples import find_tokenizer
from attn_callbacks.callbacks._watch import QuietRecorder
from attn_callbacks.callbacks._writer import BackgroundWriter
from attn_callbacks.capture import AttentionCall, call_name
from attn_callbacks.metrics.roles import HeadRolesResult

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["HeadRoles"]


class HeadRoles(ValidationObserver):
    """Say after each validation what every attention head does, and which heads have changed.

    An observer: training is bit-identical with and without it. Every head gets one of the labels of
    :func:`attn_callbacks.functional.role_labels.label_roles` (previous token, sink, uniform, ...), from its scores
    averaged over the first validation loader. A head whose label is sure and differs from its last sure one has
    changed: ``layer 2 head 3 became a previous-token head (0.71, was sink)``.

    Logs ``roles/labels`` (layer x head, pale where unsure), ``roles/timeline`` (heads that changed x epochs),
    ``roles/drift_by_head``, the text ``roles/changes``, the share of heads with each label (``roles/<label>``) and, for
    monitors too, means over heads: ``roles/short_range_mass`` (at most 4 tokens away), ``roles/long_range_mass`` (more
    than a quarter of the sequence) and ``roles/drift``. With scipy also ``roles/clusters`` (distances in the order of
    their tree), ``roles/cluster_layout`` (heads in a plane) and ``roles/redundant`` (pairs that look alike).
    ``attention/head_roles.csv`` in the run's folder has a row a head. The numbers are in ``result``, ``drift``,
    ``changes``, ``timeline`` and ``head_clusters``, also without a logger.

    Drift is the Jensen-Shannon distance of a head to itself at the last look, on fixed samples, from 0 to 1. Their
    weights stay on the CPU as float32, at most 8 MiB a layer (twice that while two looks are compared): of longer
    sequences some rows, or fewer samples. A loader that shuffles has no fixed samples: that is told. With several
    processes they are those of the first one. A checkpoint keeps the timeline, not these weights.

    Args:
        schema: Where a batch has what; the default reads ``(x, y)`` and Hugging Face batches. Token ids are needed for
            ``duplicate`` and ``induction``, and for all that is about special tokens.
        layers: Names or glob patterns of attention modules; ``None`` takes all.
        every_n_batches: Look at every n-th validation batch.
        every_n_epochs: Look after every n-th epoch.
        special: Ids of special tokens; ``None`` asks the ``tokenizer`` of the module or data module, if there is one.
        separator: Ids of separators, likewise.
        grid: ``(rows, columns, prefix)`` of image patches; ``None`` reads it off the batch's images.
        rows: Query rows looked at in each sequence, the same ones every time; shorter sequences are exact.
        margin: How clear a label must be to count as sure. A declared heuristic.
        clusters: Cluster heads on the fixed samples: ``True`` in as many clusters as fit best, or a number of them.
        drift_samples: Number of fixed samples, the first ones; 0 for neither drift nor clusters.
        probe_vocabulary: Also show the module a random text twice, of this many token ids, and look for induction
            heads (``roles/probe``): runs ``module(ids)`` after each look, on the first process.

    Raises:
        ValueError: If a number is too small, or ``grid`` has not three of them.
        TypeError: If a list is a single string or number.

    Example:
        >>> HeadRoles(special=[101, 102], separator=[102])
        HeadRoles(special=(101, 102), separator=(102,))
    """

    _needs_logger = False  # the result is there without one

    def __init__(
        self,
        schema: BatchSchema | None = None,
        layers: Sequence[str] | None = None,
        every_n_batches: int = 1,
        every_n_epochs: int = 1,
        special: Sequence[int] | None = None,
        separator: Sequence[int] | None = None,
        grid: Sequence[int] | None = None,
        rows: int = 128,
        margin: float = 0.1,
        clusters: bool | int = True,
        drift_samples: int = 8,
        probe_vocabulary: int | None = None,
    ) -> None:
        super().__init__(schema, every_n_epochs, every_n_batches)
        self._writer = BackgroundWriter(self._guard)
        self.layers = None if layers is None else name_list("layers", layers)
        self.special, self.separator = id_list("special", special), id_list("separator", separator)
        self.grid = id_list("grid", grid)
        if self.grid is not None and len(self.grid) != 3:
            raise ValueError(f"`grid` must be (rows, columns, prefix), got {grid}.")
        self.rows = at_least("rows", rows, 2)
        self.margin = in_range("margin", margin, 0.0, 1.0)
        self.clusters: bool | int = clusters if isinstance(clusters, bool) else at_least("clusters", clusters, 2)
        self.drift_samples = at_least("drift_samples", drift_samples, 0)
        self.probe_vocabulary = None if probe_vocabulary is None else at_least("probe_vocabulary", probe_vocabulary, 32)
        self.result: HeadRolesResult | None = None
        self.drift: Tensor | None = None
        self.head_clusters: HeadClusters | None = None
        self.probe: PatternProbeResult | None = None
        self._recorder: QuietRecorder | None = None
        self._extras: RoleExtras | None = None
        self._reader: RoleReader | None = None
        self._monitored: dict[str, float] = {}
        self._history = RoleTimeline(margin)
        self._clear()

    @property
    def timeline(self) -> list[dict[str, Any]]:
        """An entry for each look of a fit: epoch, step, layers, labels, their strength and margin, drift."""
        return self._history.entries

    @property
    def changes(self) -> list[RoleChange]:
        """All changes of a fit, in their order; ``str`` makes a sentence of each."""
        return self._history.changes

    @property
    def state_key(self) -> str:
        """Tell callbacks of different layers apart."""
        return f"HeadRoles[layers={self.layers!r}]"

    def state_dict(self) -> dict[str, Any]:
        """Return the timeline."""
        return {"timeline": list(self.timeline)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the timeline of a checkpoint."""
        self._history.load(state_dict.get("timeline", []))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Conclude and log, and give callbacks what they monitor, also where nothing was looked at."""
        super().on_validation_epoch_end(trainer, pl_module)
        if self._removes and not trainer.sanity_checking:
            log_monitored(trainer, pl_module, self._monitored, logger=not self._fitting)

    def _start(self, trainer: Trainer, module: LightningModule) -> None:
        self._recorder = QuietRecorder(module, self.layers, self._measure, self._guard)
        self._sums = RoleSums(trainer.world_size)
        self._memory = HeadMemory(self.drift_samples if trainer.is_global_zero else 0)
        self._monitored = dict.fromkeys(MONITORED, np.nan) if self._fitting else {}
        self.result = self.drift = self.head_clusters = self.probe = None
        if self._fitting:
            self._history = RoleTimeline(self.margin)  # a checkpoint is read after this
        tokenizer = find_tokenizer(module, trainer)
        special = token_ids(self.special, tokenizer, "all_special_ids")
        separator = token_ids(self.separator, tokenizer, "sep_token_id")
        grid = None if self.grid is None else (self.grid[0], self.grid[1], self.grid[2])
        self._reader = RoleReader(self.schema, special, separator, grid, self.rows)
        if trainer.is_global_zero:
            clusters = self.drift_samples > 0 and self.clusters
            self._extras = RoleExtras(trainer, self.layers, clusters, self.probe_vocabulary)

    def _detach(self) -> None:
        super()._detach()
        self._recorder = self._extras = self._reader = None
        self._clear()

    def _clear(self) -> None:
        self._sums, self._memory, self._seen, self._told = RoleSums(), HeadMemory(0), 0, False

    def _begin(self, trainer: Trainer) -> None:
        self._seen = 0
        self._memory.begin()

    def _watch(self, batch: Any) -> AbstractContextManager[Any]:
        if self._recorder is None or self._reader is None:
            return nullcontext()
        size = self._reader.read(batch, self._seen)
        found = (self.schema.read(name, batch) for name in ("tokens", "image", "inputs"))
        self._memory.see(size, next((part for part in found if isinstance(part, Tensor) and part.dim()), None))
        self._seen += 1
        return self._recorder.watch()

    def _measure(self, call: AttentionCall) -> None:
        if self._reader is None:
            return
        maps, layer = self._reader.maps(call), call_name(call)
        self._sums.add(layer, self._reader.scores(call, maps))
        self._memory.take(layer, maps)

    def _finish(self, trainer: Trainer, module: LightningModule) -> None:
        moved, result, changes, known = {}, None, [], {}
        with self._guarded(), torch.inference_mode(False), torch.no_grad():
            moved = self._memory.drift()
        with self._guarded(), torch.inference_mode(False), torch.no_grad():
            found = self._sums.conclude(trainer.strategy.root_device, moved, failure=self._guard.cause)
            if found is not None:
                result, drift = self.result, self.drift = found
                known = monitored_scalars(result, drift)
                if self._fitting:
                    changes = self._history.add(trainer.current_epoch, trainer.global_step, result, drift)
        self._monitored = {**dict.fromkeys(MONITORED if self._fitting else (), np.nan), **known}
        if self._memory.shuffled and not self._told:
            self._told = True
            rank_zero_warn("`HeadRoles` knows no drift: the validation loader gives other samples, or another order.")
        if result is not None and self._extras is not None:
            with self._guarded():
                self._write(trainer, module, result, changes)

    def _write(
        self, trainer: Trainer, module: LightningModule, result: HeadRolesResult, changes: list[RoleChange]
    ) -> None:
        if self.drift is None or self._extras is None:
            return
        found = self._extras.find(self._memory, module)
        self.head_clusters, self.probe = self._extras.clusters, self._extras.probe
        if not can_log(trainer):
            return
        timeline = self._history if self._fitting else None
        drawn = role_pictures(result, self.drift, timeline, self._history.sure, f"epoch {trainer.current_epoch}")
        # in `trainer.validate` Lightning writes what is monitored: what it returns is what it logs
        scalars = {**share_scalars(result), **(monitored_scalars(result, self.drift) if self._fitting else {})}
        pictures = {tag: self._writer.submit(draw) for tag, draw in {**drawn, **found.pictures}.items()}
        log_point(trainer, self._writer, self._folder, pictures, with_epoch(trainer, {**scalars, **found.scalars}))
        told = change_text(changes, self._history.unsure_changes() if self._fitting else 0)
        for tag, text in {"roles/changes": told, **found.texts}.items():
            if text:
                log_text(trainer, tag, text)
        if self._folder is not None:
            at = self._folder / "attention" / "head_roles.csv", trainer.current_epoch, trainer.global_step
            self._writer.submit(partial(append_roles, *at, result, self.drift))
